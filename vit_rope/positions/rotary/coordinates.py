"""Coordinates rescaled by the grid that they come from, as modifiers of any scheme.

Shapes   A axes, coordinates (…, A)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base import Layout, Position, Wrapper
from ..coords import check_shape
from ..encoding import Encoding
from ..specs import register
from .base import Rotary


class Rescaled(Wrapper):
    """A scheme that sees other coordinates than its layout gives; subclasses define how an axis of
    cells is rescaled.

    Custom coordinates, which come from no grid, are treated as cells of `default_grid`, or stay as
    they are where that is None.
    """

    same_extent = True
    default_grid: tuple[int, ...] | None = None

    def __init__(self, layout: Layout, scheme: Position) -> None:
        super().__init__(scheme)
        rotary = [part for part in scheme.modules() if isinstance(part, Rotary)]
        if any(change.dynamic for part in rotary for change in part.changes):
            raise ValueError(
                f"dynamic depends on how far a grid extends, but {type(self).__name__.lower()} makes all grids "
                f"extend equally; use ntk, yarn or interpolate, with a factor"
            )
        self.layout = layout

    def axis(self, cells: Tensor, a: int, n: Any) -> Tensor:
        """Coordinates `cells` along axis a, which has n cells, as the inner scheme sees them."""
        raise NotImplementedError(f"{type(self).__name__} needs axis()")

    def measure(self, coords: Tensor, grid: Sequence[int]) -> Tensor:
        return torch.stack([self.axis(coords[..., a], a, n) for a, n in enumerate(grid)], dim=-1)

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        sizes = self.default_grid if grid is None else grid
        if sizes is not None:
            coords = self.measure(coords, sizes)
            key_coords = None if key_coords is None else self.measure(key_coords, sizes)
        return self.scheme.encode(coords, key_coords, grid)


@register
class Reference(Rescaled):
    """A scheme that rescales every grid to one of `grid` cells: coordinate c of n cells counts as c
    / n * grid.

    So an image of any size covers the angles of the size that EVA-02 (arXiv:2303.11331) was trained
    with. `grid` is the training grid unless given. Custom coordinates, which come from no grid, are
    taken as cells of the reference. Raises ValueError for a grid with another number of axes.
    """

    def __init__(self, layout: Layout, scheme: Position, grid: tuple[int, ...] | None = None) -> None:
        super().__init__(layout, scheme)
        self.grid = layout.grid if grid is None else grid
        check_shape(self.grid)
        if len(self.grid) != layout.axes:
            raise ValueError(f"reference grid {self.grid} has {len(self.grid)} axes, the layout {layout.axes}")

    def axis(self, cells: Tensor, a: int, n: Any) -> Tensor:
        return cells / n * self.grid[a]


@register
class Normalize(Rescaled):
    """A scheme that sees the cells of every axis evenly spaced from `low` to `high`, the outermost
    cells at the ends.

    With `grows`, `high` is that of the training grid of N cells, and n cells end at high * n / N,
    as in LieRE (arXiv:2406.10322). Custom coordinates are taken as those of the training grid.
    Raises ValueError where `low` equals `high`.
    """

    def __init__(
        self, layout: Layout, scheme: Position, low: float = -1.0, high: float = 1.0, grows: bool = False
    ) -> None:
        super().__init__(layout, scheme)
        if low == high:
            raise ValueError(f"normalize needs low and high to differ, got {low} for both")
        self.low, self.high, self.grows, self.default_grid = low, high, grows, layout.grid

    def measure(self, coords: Tensor, grid: Sequence[int]) -> Tensor:
        return super().measure(self.layout.cell(coords, grid), grid)

    def axis(self, cells: Tensor, a: int, n: Any) -> Tensor:
        high = self.high * n / self.layout.grid[a] if self.grows else self.high
        return self.low + cells * (high - self.low) / torch.sym_max(n - 1, 1)
