"""Pictures: the only module that imports matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from .analysis import kernel
from .positions import Layout, build


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


def plot_growth(tokens: Sequence[int], curves: dict[str, dict[str, list[float]]], out: Path) -> Path:
    """Draw how time and memory of schemes grow with the number of tokens, with the slopes, and write a PNG.

    `curves` has, for each spec, values for each number of tokens, relative to the first, of "attention", "encoding" and
    "memory".
    """
    from .bench.growth import slope

    titles = {
        "attention": "Time of encoding and attention",
        "encoding": "Time of encoding alone",
        "memory": "Peak memory of both",
    }
    figure = Figure(figsize=(11.5, 3.9), layout="constrained")
    for axis, (kind, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for spec, found in curves.items():
            if kind in found:
                label = f"{spec}: N^{slope(tokens, found[kind]):.2f}"
                axis.loglog(tokens, found[kind], marker="o", markersize=3, label=label)
        axis.set(title=title, xlabel="tokens N", ylabel=f"relative to N = {tokens[0]}")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, title="slope of the larger half")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    return out
