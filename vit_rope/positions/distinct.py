"""Whether rotations tell positions apart: angles that differ by full revolutions are the same.

Shapes   L layers and H heads (1 if shared), A axes, R channel pairs; speeds (L, H, A, R)
"""

import math

import torch
from torch import Tensor

MAX_CELLS = 2**20  # of the grid of displacements that are compared


def distinct(speeds: Tensor | None, grid: tuple[int, ...] | None, beyond: bool = False) -> bool:
    """Whether rotations at `speeds` (L, H, A, R), in radians per cell, tell apart all cells of a
    grid, or, with `beyond`, all coordinates.

    Two cells look the same where the angles between them are full revolutions for all pairs. Beyond
    the grid they are compared on one of up to 8 times its sides. Without a grid only directions
    count.
    """
    if speeds is None:
        return False
    rows = speeds.detach().double().transpose(-2, -1).flatten(0, -2)  # (L · H · R, A)
    rows = rows[rows.any(dim=1)].unique(dim=0)
    axes = rows.shape[1]
    if (beyond or grid is None) and (len(rows) < axes or int(torch.linalg.matrix_rank(rows, rtol=1e-6)) < axes):
        return False
    if grid is None:
        return True
    times = 8 if beyond else 1
    while times > 1 and math.prod(2 * times * n for n in grid) > MAX_CELLS:
        times -= 1
    sides = [torch.arange(1 - times * n, times * n, device="cpu", dtype=torch.float64) for n in grid]
    sides[0] = sides[0][sides[0] >= 0]  # the others are their opposites
    steps = torch.cartesian_prod(*sides).reshape(-1, axes)
    steps = steps[steps.any(dim=1)]
    sizes = torch.tensor(grid, device="cpu", dtype=torch.float64)
    tolerances = 2e-6 * times * rows.abs() @ sizes  # the rounding of speeds and coordinates
    for some, tolerance in zip(rows.split(8), tolerances.split(8), strict=True):
        revolutions = steps @ some.mT / (2 * math.pi)
        same = ((revolutions - revolutions.round()).abs() * 2 * math.pi <= tolerance).all(dim=1)
        steps = steps[same]
        if len(steps) == 0:
            return True
    return len(steps) == 0
