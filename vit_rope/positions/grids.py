"""Tables over a grid: how to resample them, read them between cells, and sum them over axes.

Shapes   N tokens, A axes, C channels; a table (*sizes, C) has a vector for each cell of a grid
"""

import math
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor, nn


def is_full_grid(coords: Tensor, grid: Sequence[int] | None) -> bool:
    """Return whether coordinates are those of all cells of their grid, in order."""
    return grid is not None and coords.ndim == 2 and coords.shape[0] == math.prod(grid)


def sum_over_axes(vectors_along: Callable[[int, Tensor], Tensor], coords: Tensor, grid: Sequence[int] | None) -> Tensor:
    """Return the sum (…, C) over the axes of `vectors_along(axis, coordinates along it)`.

    On a full grid it is called with one coordinate for each row and each column, not for each cell.
    """
    axes = range(coords.shape[-1])
    if grid is None or not is_full_grid(coords, grid):
        return torch.stack([vectors_along(a, coords[..., a]) for a in axes]).sum(dim=0)
    cells, total = coords.view(*grid, len(axes)), torch.zeros(1, device=coords.device)
    for a in axes:
        vectors = vectors_along(a, cells[tuple(slice(None) if i == a else 0 for i in axes)][:, a])
        total = total + vectors.view(*(grid[a] if i == a else 1 for i in axes), -1)
    return total.flatten(0, -2)


def resample(table: Tensor, grid: Sequence[int]) -> Tensor:
    """Resample a table (*sizes, C) to (*grid, C).

    Resampling is bicubic and antialiased for two axes, linear along each axis otherwise.
    """
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
    """Return whether a table already has the shape of the grid.

    A compiled graph with dynamic shapes must not depend on the answer: there it is True only if the
    shapes are known to be equal.
    """
    if not torch.compiler.is_compiling():
        return tuple(sizes) == tuple(grid)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return all(statically_known_true(n == m) for n, m in zip(sizes, grid, strict=True))


def interpolate(table: Tensor, cells: Tensor) -> Tensor:
    """Interpolate a table (*sizes, C) linearly at fractional cells (…, A), to (…, C).

    Cells beyond the border have the vectors of the border.

    """
    sizes = table.shape[:-1]
    cells = torch.stack([cells[..., a].clamp(0, n - 1) for a, n in enumerate(sizes)], dim=-1)
    low = cells.floor()
    fraction = cells - low
    total = torch.zeros(1, device=table.device)
    for corner in product((0, 1), repeat=len(sizes)):
        steps = torch.tensor(corner, device=cells.device)
        weight = torch.where(steps == 1, fraction, 1 - fraction).prod(dim=-1, keepdim=True)
        index = (low.long() + steps).unbind(-1)
        total = total + table[tuple(i.clamp(max=n - 1) for i, n in zip(index, sizes, strict=True))] * weight
    return total
