"""Displacements Δ = key - query between tokens, in cells of the training grid in every unit.

The N² displacements between the cells of a full grid repeat. An axis of s cells has only 2s - 1
different ones, and a grid only prod(2s - 1). A function of the displacement is evaluated once for
each of these, and pairs look up their value by index. Displacements along an axis are in rising
order, those of a grid in row-major order.

Shapes   B samples (1 if shared), N queries, M keys, A axes, T displacements of a grid,
         s cells and 2s - 1 displacements along an axis
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Layout
from .coords import grid as make_grid
from .grids import is_full_grid


def within_full_grid(coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> bool:
    """Return whether queries are all cells of the grid, in order, and keys are the same tokens."""
    return key_coords is None and is_full_grid(coords, grid)


def pairwise(queries: Tensor, keys: Tensor) -> Tensor:
    """Return displacements (B, N, M, A) from queries ([B,] N, A) to keys ([B,] M, A)."""
    queries, keys = (t[None] if t.ndim == 2 else t for t in (queries, keys))
    return keys[:, None] - queries[:, :, None]


def of_pairs(layout: Layout, coords: Tensor, key_coords: Tensor | None) -> Tensor:
    """Return the displacements (B, N, M, A) of all pairs, in cells of the training grid."""
    cells = layout.cell(coords)
    return pairwise(cells, cells if key_coords is None else layout.cell(key_coords))


def along_axes(
    layout: Layout, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the displacements (2s - 1,) along each axis, and the index (B, N, M) of each pair.

    Both are lists with an entry for each axis.

    Coordinates that are not a full grid are compared with the cells of `grid`, or of the training
    grid if that is None. Their displacements are rounded to integer numbers of cells and clamped to
    the displacements of that grid.
    """
    sizes = layout.grid if grid is None else grid
    if within_full_grid(coords, key_coords, grid):
        cells, lattice = make_grid(sizes, device=coords.device), coords
    else:
        cells, lattice = layout.cell(coords, sizes), layout.coords(sizes, coords.device).to(coords.dtype)
    delta = pairwise(cells, cells if key_coords is None else layout.cell(key_coords, sizes)).round()
    lattice = layout.cell(lattice).view(*sizes, -1)
    lines, index = [], []
    for a, n in enumerate(sizes):
        points = lattice[tuple(slice(None) if i == a else 0 for i in range(len(sizes)))][:, a]
        steps = torch.arange(1 - n, n, device=points.device)
        lines.append((points - points[0])[steps.abs()] * steps.sign())
        index.append((delta[..., a].clamp(1 - n, n - 1) + (n - 1)).long())
    return lines, index


def combine_axes(lines: Sequence[Tensor], index: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return all displacements (T, A) of a grid, and the index (B, N, M) of each pair.

    `lines` and `index` are the results of `along_axes`; T = prod(2s - 1).
    """
    flat_index = index[0]
    for line, axis_index in zip(lines[1:], index[1:], strict=True):
        flat_index = flat_index * line.shape[0] + axis_index
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1).flatten(0, -2), flat_index


def look_up(values: Tensor, index: Tensor) -> Tensor:
    """Return the values (…, B, N, M) of a table (…, T) at an index (B, N, M)."""
    return values.index_select(-1, index.flatten()).unflatten(-1, index.shape)
