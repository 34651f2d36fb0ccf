"""Pictures: the only module that imports matplotlib."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from .analysis import kernel
from .bench.growth import KINDS
from .bench.measure import Ratio
from .positions import Layout, build


def slope(tokens: Sequence[int], values: Sequence[float]) -> float:
    """The exponent of growth over the larger half of the sizes, by least squares on logarithms."""
    half = len(tokens) // 2
    x, y = ([math.log(v) for v in series[half:]] for series in (tokens, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def plot_kernel(
    specs: list[str], out: str = "kernel.png", grid: tuple[int, int] = (14, 14), head_dim: int = 64, heads: int = 4
) -> Path:
    """Draw K(Δ), what rotary schemes make of a displacement, and write a PNG.

    Each spec gets a map over all displacements of an image grid (one of its heads) and its curves along a row and
    along the diagonal. Raises ValueError for a scheme that rotates nothing, before anything is written.
    """
    rows, columns = (torch.arange(1 - n, n, dtype=torch.float64) for n in grid)
    plane = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
    distance = torch.linspace(0, max(grid) - 1, 200, dtype=torch.float64)
    layout = Layout(width=head_dim * heads, heads=heads, grid=grid, depth=1)
    torch.manual_seed(0)
    with torch.no_grad():
        schemes = [build(spec, layout) for spec in specs]
        maps = [kernel(scheme, plane)[0].numpy() for scheme in schemes]
        along = [kernel(s, torch.stack((torch.zeros_like(distance), distance), dim=-1))[0].numpy() for s in schemes]
        across = [kernel(s, torch.stack((distance, distance), dim=-1) / 2**0.5)[0].numpy() for s in schemes]

    steps = distance.numpy()
    figure = Figure(figsize=(3.1 * len(specs) + 0.6, 5.6), layout="constrained")
    axes = figure.subplots(2, len(specs), squeeze=False, height_ratios=[1.15, 1])
    extent = (1 - grid[1] - 0.5, grid[1] - 0.5, grid[0] - 0.5, 1 - grid[0] - 0.5)
    for column, spec in enumerate(specs):
        top, bottom = axes[0, column], axes[1, column]
        image = top.imshow(maps[column], vmin=-1, vmax=1, cmap="RdBu_r", extent=extent)
        top.set(title=spec, xlabel="columns apart", ylabel="rows apart" if column == 0 else "")
        bottom.plot(steps, along[column], label="along a row")
        bottom.plot(steps, across[column], "--", label="along the diagonal")
        bottom.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        bottom.set(xlabel="distance (patches)", ylabel="K" if column == 0 else "", ylim=(-0.6, 1.05))
    axes[1, 0].legend(frameon=False)
    figure.colorbar(image, ax=axes[0, :], label="K: mean cosine", shrink=0.9)
    figure.suptitle(f"What a displacement does to a query-key score ({head_dim} channels a head, one head)")
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    return path


def plot_growth(found: Sequence[Ratio], out: Path) -> Path:
    """Draw how time and memory of schemes grow with the number of tokens, with the slopes, and write a PNG.

    `found` are rows of `bench growth`. Each kind of measurement gets a panel, in which each spec has a curve of values
    relative to the smallest number of tokens.
    """
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for title in KINDS.values():
        for row in found:
            if row.group.startswith(f"{title}, "):
                tokens = curves.setdefault(title, {}).setdefault(row.group.removeprefix(f"{title}, "), {})
                tokens[int(row.candidate.split()[0])] = row.median
    specs = list(dict.fromkeys(spec for some in curves.values() for spec in some))
    figure = Figure(figsize=(3.85 * len(curves), 3.9), layout="constrained")
    for axis, (title, some) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for spec, values in some.items():
            label = f"{spec}: N^{slope(list(values), list(values.values())):.2f}"
            style: dict[str, Any] = {"color": f"C{specs.index(spec)}", "marker": "o", "markersize": 3, "label": label}
            axis.loglog(list(values), list(values.values()), **style)
            axis.set_ylabel(f"relative to N = {min(values)}")
        axis.set(title=title.capitalize(), xlabel="tokens N")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, title="slope of the larger half")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    return out


def plot_ratios(found: Sequence[Ratio], out: Path) -> Path:
    """Draw what each candidate took against the reference of its group, with quartiles, and write a PNG.

    The more numerous of groups and candidates have a line each, the others a colour.
    """
    groups, names = (list(dict.fromkeys(keys)) for keys in ([r.group for r in found], [r.candidate for r in found]))
    lines, colours = (groups, names) if len(groups) >= len(names) else (names, groups)
    height = 0.22 * len(lines) * max(1.0, len(colours) / 6) + 1.2
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    for index, colour in enumerate(colours):
        some = [r for r in found if colour in (r.group, r.candidate)]
        at = [lines.index(r.group if lines is groups else r.candidate) for r in some]
        aside = 0.7 * (index + 0.5) / len(colours) - 0.35
        spread = [[r.median - r.low for r in some], [r.high - r.median for r in some]]
        style: dict[str, Any] = {"markersize": 4, "linewidth": 1, "color": f"C{index % 10}", "label": colour}
        medians = [r.median for r in some]
        axes.errorbar(medians, [y + aside for y in at], xerr=spread, fmt="osDv^<>Ph*"[index // 10 % 10], **style)
    axes.axvline(1, color="0.5", linewidth=0.8, zorder=0)
    axes.set(title="What each took, against what was measured beside it", xlabel="ratio (median and quartiles)")
    axes.set(ylim=(len(lines) - 0.5, -0.5))
    axes.set_yticks(range(len(lines)), lines)
    wide = max(r.high for r in found) / min(r.low for r in found)
    if wide > 3:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide < 1000 else (1,)))  # more would not fit
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=max(1, min(4, 100 // max(map(len, colours)))), frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=80)
    return out


def plot_study(table: str | Path, out: str = "study.png") -> Path:
    """Draw the table of a study, of `vit-rope study`, with a column for each host; write a PNG.

    Lines and bars are means over the seeds, bands and dots the seeds themselves. The topmost panels are convergence
    curves; below come, where the table has them, the final loss by noise level, the Fréchet distance of samples and how
    well they hang together, with the value of real images. Raises ValueError for another file, before writing.
    """
    with Path(table).open(newline="") as file:
        rows = [{key: _number(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    if not rows or not {"host", "position", "seed", "step", "val/loss"} <= set(rows[0]):
        raise ValueError(f"{table} is no table of a study; vit-rope study writes one")
    hosts = _by(rows, "host")
    colours = {position: f"C{i}" for i, position in enumerate(_by(rows, "position"))}
    draws = {"val/loss": _draw_curves, "val/loss_t000": _draw_levels, "fd": _draw_distance, "parts": _draw_coherence}
    draws = {key: draw for key, draw in draws.items() if any(key in row for row in rows)}
    figure = Figure(figsize=(4.2 * len(hosts), 2.9 * len(draws) + 0.8), layout="constrained")
    panels = figure.subplots(len(draws), len(hosts), squeeze=False)
    for column, (host, some) in enumerate(hosts.items()):
        panels[0, column].set_title(host)
        for line, (key, draw) in enumerate(draws.items()):
            if any(key in row for row in some):
                draw(panels[line, column], some, colours)
            else:
                panels[line, column].set_axis_off()
    handles = [Line2D([], [], color=colour, marker="o") for colour in colours.values()]
    figure.legend(handles, list(colours), loc="outside upper center", ncols=len(colours), frameon=False)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    return path


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _over_seeds(rows: list[dict[str, Any]], key: str) -> list[float]:
    """Mean, lowest and highest of a column."""
    values = [row[key] for row in rows if key in row]
    return [mean(values), min(values), max(values)]


def _draw_curves(axes: Any, rows: list[dict[str, Any]], colours: dict[str, str]) -> None:
    for position, some in _by(rows, "position").items():
        steps = _by(some, "step")
        middle, low, high = zip(*(_over_seeds(at, "val/loss") for at in steps.values()), strict=True)
        axes.plot(list(steps), middle, color=colours[position])
        axes.fill_between(list(steps), low, high, color=colours[position], alpha=0.2, linewidth=0)
    seeds = len(_by(rows, "seed"))
    axes.set(xlabel=f"training steps (seeds: {seeds})", ylabel="validation loss", yscale="log")
    axes.yaxis.set_minor_locator(MaxNLocator(5))
    axes.yaxis.set_minor_formatter("{x:.2f}")


def _draw_levels(axes: Any, rows: list[dict[str, Any]], colours: dict[str, str]) -> None:
    names = [key for key in rows[0] if key.startswith("val/loss_t")]
    runs = _by([row for row in rows if row["step"] == max(row["step"] for row in rows)], "position")
    times, first = [int(name.removeprefix("val/loss_t")) for name in names], next(iter(runs))
    for position, some in runs.items():
        ratios = [_over_seeds(some, name)[0] / _over_seeds(runs[first], name)[0] - 1 for name in names]
        axes.plot(times, [100 * ratio for ratio in ratios], ".-", color=colours[position])
    axes.set(xlabel="noise level t, from", ylabel=f"final loss against {first} (%)")


def _draw_distance(axes: Any, rows: list[dict[str, Any]], colours: dict[str, str]) -> None:
    _draw_scores(axes, rows, colours, "fd", "fd_floor", "Fréchet distance")


def _draw_coherence(axes: Any, rows: list[dict[str, Any]], colours: dict[str, str]) -> None:
    if any("copy_error" in row for row in rows):
        _draw_scores(axes, rows, colours, "copy_error", "copy_error_real", "left and right differ by")
    else:
        _draw_scores(axes, rows, colours, "parts", "parts_real", "connected parts per image")


def _draw_scores(
    axes: Any, rows: list[dict[str, Any]], colours: dict[str, str], key: str, real: str, label: str
) -> None:
    rows = [row for row in rows if key in row]
    for x, (position, some) in enumerate(_by(rows, "position").items()):
        axes.bar(x, _over_seeds(some, key)[0], color=colours[position], alpha=0.4)
        axes.plot([x] * len(some), [row[key] for row in some], "o", markersize=4, color=colours[position])
    axes.axhline(_over_seeds(rows, real)[0], color="0.3", linestyle="--", linewidth=1, label="real images")
    axes.set(ylabel=label, xticks=[], xlabel="samples of each")
    axes.legend(frameon=False)


def _by(rows: list[dict[str, Any]], key: str) -> dict[Any, list[dict[str, Any]]]:
    """The rows of each value in a column, in the order in which they come."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups
