"""TODO positions.grids from ['positions.absolute']."""

import math
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor, nn


def is_whole(coords: Tensor, grid: Sequence[int] | None) -> bool:
    """Whether coordinates are those of all cells of their grid, in order."""
    return grid is not None and coords.ndim == 2 and coords.shape[0] == math.prod(grid)


def summed(along: Callable[[int, Tensor], Tensor], coords: Tensor, grid: Sequence[int] | None) -> Tensor:
    """The sum over the axes of `along(axis, places)` (…, C), asked once for each row and column of a whole grid."""
    axes = range(coords.shape[-1])
    if grid is None or not is_whole(coords, grid):
        return torch.stack([along(a, coords[..., a]) for a in axes]).sum(dim=0)
    lines, total = coords.view(*grid, len(axes)), torch.zeros(1, device=coords.device)
    for a in axes:
        vectors = along(a, lines[tuple(slice(None) if i == a else 0 for i in axes)][:, a])
        total = total + vectors.view(*(grid[a] if i == a else 1 for i in axes), -1)
    return total.flatten(0, -2)


def resample(table: Tensor, grid: Sequence[int]) -> Tensor:
    """A table (*sizes, C) resampled to (*grid, C): bicubic and antialiased on images, else linear along each axis."""
    if _same(table.shape[:-1], grid):
        return table
    if len(grid) == 2:
        image = table.movedim(-1, 0)[None]
        image = nn.functional.interpolate(image, tuple(grid), mode="bicubic", antialias=True, align_corners=False)
        return image[0].movedim(0, -1)
    for axis, size in enumerate(grid):  # linear along one axis after another is linear along all
        lines = table.movedim(axis, -1)
        line = nn.functional.interpolate(lines.flatten(0, -2)[None], size, mode="linear", align_corners=False)[0]
        table = line.view(*lines.shape[:-1], size).movedim(-1, axis)
    return table


def _same(sizes: Sequence[int], grid: Sequence[int]) -> bool:
    """Whether a table has the grid's shape already; a compiled graph for all shapes must not ask, and resamples."""
    if not torch.compiler.is_compiling():
        return tuple(sizes) == tuple(grid)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return all(statically_known_true(n == m) for n, m in zip(sizes, grid, strict=True))


def read(table: Tensor, cells: Tensor) -> Tensor:
    """Vectors (…, C) of a table (*sizes, C) at fractional cells (…, A), linear between the cells around each."""
    sizes = table.shape[:-1]
    cells = torch.stack([cells[..., a].clamp(0, n - 1) for a, n in enumerate(sizes)], dim=-1)
    low = cells.floor()
    part = cells - low
    total = torch.zeros(1, device=table.device)
    for corner in product((0, 1), repeat=len(sizes)):
        steps = torch.tensor(corner, device=cells.device)
        weight = torch.where(steps == 1, part, 1 - part).prod(dim=-1, keepdim=True)
        at = (low.long() + steps).unbind(-1)
        total = total + table[tuple(i.clamp(max=n - 1) for i, n in zip(at, sizes, strict=True))] * weight
    return total
