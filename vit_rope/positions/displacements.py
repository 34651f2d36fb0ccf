"""Displacements between tokens, Δ = key - query, in cells of the training grid whatever the unit of coordinates.

The N² displacements of a whole grid repeat: only prod(2s - 1) of them differ, 2s - 1 along each axis. Whatever is a
function of displacement is evaluated there, and pairs look theirs up by index. Along an axis displacements are in
rising order; those of a grid are in row-major order.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import coords as places
from .base import Layout


def is_whole(coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> bool:
    """Whether coords are all cells of the grid, and keys are there too."""
    return key_coords is None and grid is not None and coords.ndim == 2 and coords.shape[0] == math.prod(grid)


def pairwise(queries: Tensor, keys: Tensor) -> Tensor:
    """Displacements (B or 1, N, M, A) from queries (N, A) or (B, N, A) to keys (M, A) or (B, M, A)."""
    queries, keys = (t[None] if t.ndim == 2 else t for t in (queries, keys))
    return keys[:, None] - queries[:, :, None]


def of_pairs(layout: Layout, coords: Tensor, key_coords: Tensor | None) -> Tensor:
    """Displacements (B or 1, N, M, A) of all pairs."""
    cells = layout.cell(coords)
    return pairwise(cells, cells if key_coords is None else layout.cell(key_coords))


def along_axes(
    layout: Layout, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """For each axis its displacements (2s - 1,), and which of them each pair has, as an index (B or 1, N, M).

    Coordinates that are no whole grid are taken for cells of the grid, or of the training grid if there is none: their
    displacements are rounded to whole cells and end where that grid does.
    """
    sizes = layout.grid if grid is None else grid
    if is_whole(coords, key_coords, grid):
        cells, lattice = places.grid(sizes, device=coords.device), coords
    else:
        cells, lattice = layout.cell(coords, sizes), layout.coords(sizes, coords.device).to(coords.dtype)
    delta = pairwise(cells, cells if key_coords is None else layout.cell(key_coords, sizes)).round()
    lattice = layout.cell(lattice).view(*sizes, -1)
    offsets, index = [], []
    for a, n in enumerate(sizes):
        line = lattice[tuple(slice(None) if i == a else 0 for i in range(len(sizes)))][:, a]
        steps = torch.arange(1 - n, n, device=line.device)
        offsets.append((line - line[0])[steps.abs()] * steps.sign())
        index.append((delta[..., a].clamp(1 - n, n - 1) + (n - 1)).long())
    return offsets, index


def across_axes(offsets: Sequence[Tensor], index: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """All displacements (T, A) of a grid, T = prod(2s - 1), and the index into them, of those along each axis."""
    number = index[0]
    for line, more in zip(offsets[1:], index[1:], strict=True):
        number = number * line.shape[0] + more
    return torch.stack(torch.meshgrid(*offsets, indexing="ij"), dim=-1).flatten(0, -2), number


def look_up(values: Tensor, index: Tensor) -> Tensor:
    """Values (…, T) at an index (B, N, M), as (…, B, N, M)."""
    return values.index_select(-1, index.flatten()).unflatten(-1, index.shape)
