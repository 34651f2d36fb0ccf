"""Plots of kernels, benchmarks and studies; the only module that imports matplotlib.

Shapes   maps (2·rows - 1, 2·columns - 1) over all displacements of a grid; curves (points,)
"""

import csv
import math
import textwrap
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

# Okabe and Ito's colours, which people with colour blindness can distinguish too; yellow is too
# pale for lines on white and is left out. Markers and line styles distinguish curves in addition.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX<>*h"
LINES = ("-", "--", "-.", ":")


# ---- kernels -------------------------------------------------------------------------------------
def plot_kernel(
    specs: list[str], out: str = "kernel.png", grid: tuple[int, int] = (14, 14), head_dim: int = 64, heads: int = 4
) -> Path:
    """Draw the kernel K(Δ) of rotary schemes, see `analysis.kernel`, and write a PNG.

    Each spec gets a map over all displacements of an image grid, and curves along a row and along
    the diagonal, all for its first head. Raises ValueError for a scheme that rotates nothing or for
    no specs, before anything is written.
    """
    if not specs:
        raise ValueError("plot_kernel needs at least one position spec, got none")
    rows, columns = (torch.arange(1 - n, n, dtype=torch.float64) for n in grid)
    plane = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
    distance = torch.linspace(0, max(grid) - 1, 200, dtype=torch.float64)
    row = torch.stack((torch.zeros_like(distance), distance), dim=-1)
    diagonal = torch.stack((distance, distance), dim=-1) / 2**0.5
    layout = Layout(width=head_dim * heads, heads=heads, grid=grid, depth=1)
    torch.manual_seed(0)
    with torch.no_grad():
        schemes = [build(spec, layout) for spec in specs]
        maps, along_row, along_diagonal = (
            [kernel(scheme, displacements)[0].numpy() for scheme in schemes] for displacements in (plane, row, diagonal)
        )

    figure = Figure(figsize=(3.1 * len(specs) + 0.9, 5.9), layout="constrained")
    axes = figure.subplots(2, len(specs), squeeze=False, height_ratios=[1.15, 1])
    extent = (1 - grid[1] - 0.5, grid[1] - 0.5, grid[0] - 0.5, 1 - grid[0] - 0.5)
    images = []
    for column, spec in enumerate(specs):
        top, bottom = axes[0, column], axes[1, column]
        images.append(top.imshow(maps[column], vmin=-1, vmax=1, cmap="RdBu_r", extent=extent))
        top.set(xlabel="column offset (patches)", ylabel="row offset (patches)" if column == 0 else "")
        top.set_title(_wrap(spec, inches=2.6))
        bottom.plot(distance.numpy(), along_row[column], color=COLORS[0], label="along a row")
        bottom.plot(distance.numpy(), along_diagonal[column], "--", color=COLORS[1], label="along the diagonal")
        bottom.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        bottom.set(xlabel="distance (patches)", ylabel="kernel K" if column == 0 else "", ylim=(-0.6, 1.05))
    axes[1, 0].legend(frameon=False)
    figure.colorbar(images[0], ax=axes[0, :], label="kernel K (mean cosine)", shrink=0.9)
    title = f"Query-key score by displacement, relative to the score at 0 (one head of {head_dim} channels)"
    figure.suptitle(_wrap(title, figure.get_figwidth()))
    return _save(figure, out, dpi=100)


# ---- benchmarks ----------------------------------------------------------------------------------
def slope(tokens: Sequence[int], values: Sequence[float]) -> float:
    """The exponent of growth, fitted to the larger half of the sizes by least squares of
    logarithms.
    """
    half = len(tokens) // 2
    x, y = ([math.log(v) for v in series[half:]] for series in (tokens, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def plot_growth(results: Sequence[Ratio], out: str | Path) -> Path:
    """Draw how time and memory grow with the number of tokens, and write a PNG.

    `results` are those of `bench growth`. Each kind of measurement gets a panel, and each spec a
    curve relative to its smallest number of tokens. The legend gives the fitted exponents.
    """
    panels: dict[str, dict[str, dict[int, float]]] = {}  # title: spec: number of tokens: ratio
    for title in KINDS.values():
        for row in results:
            if row.group.startswith(f"{title}, "):
                curve = panels.setdefault(title, {}).setdefault(row.group.removeprefix(f"{title}, "), {})
                curve[int(row.candidate.split()[0])] = row.median
    styles = _styles(spec for curves in panels.values() for spec in curves)
    figure = Figure(figsize=(3.85 * len(panels), 4.2), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for spec, curve in curves.items():
            label = f"{spec}: N^{slope(list(curve), list(curve.values())):.2f}"
            axes.loglog(list(curve), list(curve.values()), **styles[spec], label=_wrap(label, inches=2.2))
            quantity = "memory" if title == KINDS["memory"] else "time"
            axes.set_ylabel(f"{quantity} relative to N = {min(curve)}")
        axes.set(title=title.capitalize(), xlabel="number of tokens N")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, title="fit to the larger half of N")
    return _save(figure, out, dpi=100)


def plot_ratios(results: Sequence[Ratio], out: str | Path) -> Path:
    """Draw the ratio of each candidate to the reference of its group, with quartiles, and write a
    PNG.

    Groups have a line each and candidates a colour and marker, or the reverse if there are more
    candidates than groups.
    """
    groups = list(dict.fromkeys(row.group for row in results))
    candidates = list(dict.fromkeys(row.candidate for row in results))
    lines, series = (groups, candidates) if len(groups) >= len(candidates) else (candidates, groups)
    styles = _styles(series)
    height = 0.22 * len(lines) * max(1.0, len(series) / 6) + 0.2 * len(series) / 2 + 1.4
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(series):
        rows = [row for row in results if name in (row.group, row.candidate)]
        offset = 0.7 * (index + 0.5) / len(series) - 0.35  # series of a line are drawn below each other
        y = [offset + lines.index(row.group if lines is groups else row.candidate) for row in rows]
        quartiles = [[row.median - row.low for row in rows], [row.high - row.median for row in rows]]
        style = styles[name] | {"linestyle": "none", "label": _wrap(name, inches=7)}
        axes.errorbar([row.median for row in rows], y, xerr=quartiles, elinewidth=1, **style)
    axes.axvline(1, color="0.5", linewidth=0.8, zorder=0)
    axes.set(ylim=(len(lines) - 0.5, -0.5))
    axes.set_yticks(range(len(lines)), [_wrap(line, inches=4.4) for line in lines])
    _scale_ratios(axes, max(row.high for row in results) / min(row.low for row in results))
    measured = {"s": "run time", "B": "memory"}
    quantity = " and ".join(dict.fromkeys(measured[row.unit] for row in results)).capitalize()
    figure.suptitle(f"{quantity} relative to the reference")
    axes.set_xlabel("ratio to the reference (median and quartiles)")
    axes.tick_params(axis="x", top=height > 8, labeltop=height > 8)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=_legend_columns(series, 9), frameon=False)
    return _save(figure, out, dpi=80)


def _scale_ratios(axes: Any, factor: float) -> None:
    """A logarithmic x axis with few labels, if the ratios differ by more than a factor of 3."""
    if factor > 3:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if factor < 1000 else (1,)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")


# ---- studies -------------------------------------------------------------------------------------
def plot_study(table: str | Path, out: str = "study.png") -> Path:
    """Draw the table of a study, written by `vit-rope study`, with a column for each host; write a
    PNG.

    A host is a model on a data set. The first row shows the validation loss during training. Below
    come, if the table has them, the final loss by noise level, the Fréchet distance of samples, and
    their coherence, both with the value of real images. Lines and bars are means over the seeds,
    bands are ranges, dots are single seeds.

    Raises ValueError for a file that is not such a table, before anything is written.
    """
    with Path(table).open(newline="") as file:
        rows = [{key: _number(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    if not rows or not {"host", "position", "seed", "step", "val/loss"} <= set(rows[0]):
        raise ValueError(f"{table} is not the table of a study; vit-rope study writes one")
    hosts, styles = _group(rows, "host"), _styles(_group(rows, "position"))
    draws = {"val/loss": _draw_curves, "val/loss_t000": _draw_levels, "fd": _draw_distance, "parts": _draw_coherence}
    draws = {key: draw for key, draw in draws.items() if any(key in row for row in rows)}
    width = 4.2 * len(hosts)
    figure = Figure(figsize=(width, 3.2 * len(draws) + 0.8), layout="constrained")
    panels = figure.subplots(len(draws), len(hosts), squeeze=False)
    for column, (host, host_rows) in enumerate(hosts.items()):
        panels[0, column].set_title(_wrap(host, inches=3.6))
        for line, (key, draw) in enumerate(draws.items()):
            if any(key in row for row in host_rows):
                draw(panels[line, column], host_rows, styles)
            else:
                panels[line, column].set_axis_off()
    handles = [Line2D([], [], **style) for style in styles.values()]
    labels = [_wrap(position, width - 1) for position in styles]
    figure.legend(handles, labels, loc="outside upper center", ncols=_legend_columns(labels, width), frameon=False)
    return _save(figure, out, dpi=80)


def _draw_curves(axes: Any, rows: list[dict[str, Any]], styles: dict[str, Any]) -> None:
    """The validation loss by training step: mean and range over the seeds."""
    for position, of_position in _group(rows, "position").items():
        steps = _group(of_position, "step")
        middle, low, high = zip(*(_mean_and_range(at_step, "val/loss") for at_step in steps.values()), strict=True)
        axes.plot(list(steps), middle, **styles[position])
        axes.fill_between(list(steps), low, high, color=styles[position]["color"], alpha=0.2, linewidth=0)
    seeds = len(_group(rows, "seed"))
    axes.set(xlabel=f"training steps (seeds: {seeds})", ylabel="validation loss (MSE)", yscale="log")
    axes.yaxis.set_minor_locator(MaxNLocator(5))
    axes.yaxis.set_minor_formatter("{x:.2f}")


def _draw_levels(axes: Any, rows: list[dict[str, Any]], styles: dict[str, Any]) -> None:
    """The final validation loss by noise level, relative to the first position scheme."""
    names = [key for key in rows[0] if key.startswith("val/loss_t")]
    last = max(row["step"] for row in rows)
    runs = _group([row for row in rows if row["step"] == last], "position")
    times, reference = [int(name.removeprefix("val/loss_t")) for name in names], next(iter(runs))
    for position, of_position in runs.items():
        losses, baseline = (
            [_mean_and_range(each, name)[0] for name in names] for each in (of_position, runs[reference])
        )
        changes = [100 * (loss / base - 1) for loss, base in zip(losses, baseline, strict=True)]
        axes.plot(times, changes, **styles[position])
    axes.set(xlabel="noise level t (bin start)", ylabel=f"change of final loss\nrelative to {reference} (%)")


def _draw_distance(axes: Any, rows: list[dict[str, Any]], styles: dict[str, Any]) -> None:
    """The Fréchet distance of samples to the training images."""
    _draw_scores(axes, rows, styles, "fd", "fd_floor", "Fréchet distance of samples")


def _draw_coherence(axes: Any, rows: list[dict[str, Any]], styles: dict[str, Any]) -> None:
    """The difference between the halves of pairs, or else the number of connected parts."""
    if any("copy_error" in row for row in rows):
        label = "left-right difference\n(mean absolute, pixels in [-1, 1])"
        _draw_scores(axes, rows, styles, "copy_error", "copy_error_real", label)
    else:
        _draw_scores(axes, rows, styles, "parts", "parts_real", "connected parts per sample")


def _draw_scores(
    axes: Any, rows: list[dict[str, Any]], styles: dict[str, Any], key: str, real: str, label: str
) -> None:
    """Bars of the mean score of each scheme, dots for its seeds, a line for real images."""
    schemes = _group([row for row in rows if key in row], "position")
    for x, (position, of_position) in enumerate(schemes.items()):
        style = styles[position]
        axes.bar(x, _mean_and_range(of_position, key)[0], color=style["color"], alpha=0.4)
        values = [row[key] for row in of_position]
        axes.plot([x] * len(values), values, **style | {"linestyle": "none"})
    floor = _mean_and_range([row for row in rows if key in row], real)[0]
    axes.axhline(floor, color="0.3", linestyle="--", linewidth=1, label="real images")
    axes.set_xticks(range(len(schemes)), [_wrap(name, inches=1.6) for name in schemes], rotation=30, ha="right")
    axes.set_ylabel(label)
    axes.margins(y=0.2)  # room for the legend above the bars
    axes.legend(frameon=False, loc="upper right")


# ---- tables and figures --------------------------------------------------------------------------
def _number(text: str) -> Any:
    """The text as a number, or unchanged if it is not one."""
    try:
        return float(text)
    except ValueError:
        return text


def _mean_and_range(rows: list[dict[str, Any]], key: str) -> tuple[float, float, float]:
    """Mean, minimum and maximum of a column."""
    values = [row[key] for row in rows if key in row]
    return mean(values), min(values), max(values)


def _group(rows: list[dict[str, Any]], key: str) -> dict[Any, list[dict[str, Any]]]:
    """The rows for each value of a column, in order of appearance."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def _styles(names: Any) -> dict[str, dict[str, Any]]:
    """A colour, marker and line style for each distinct name."""
    return {
        name: {
            "color": COLORS[index % len(COLORS)],
            "marker": MARKERS[index % len(MARKERS)],
            "linestyle": LINES[index % len(LINES)],
            "markersize": 4,
        }
        for index, name in enumerate(dict.fromkeys(names))
    }


def _wrap(text: str, inches: float) -> str:
    """The text in lines of at most a width, at 0.095 inches per character (10 points)."""
    return textwrap.fill(text, max(8, int(inches / 0.095)))


def _legend_columns(labels: Sequence[str], inches: float) -> int:
    """How many columns of these labels fit the width of a figure."""
    longest = max(len(line) for label in labels for line in label.splitlines())
    return max(1, min(len(labels), int(inches / (0.085 * longest + 0.6))))


def _save(figure: Figure, out: str | Path, dpi: int) -> Path:
    """Write a figure as PNG, in a folder that is made if needed."""
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    return path
