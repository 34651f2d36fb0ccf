"""Coordinates that a scheme measures by the grid they come from, as modifiers of the scheme."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base import Layout, Position
from ..coords import check_shape
from ..encoding import Encoding
from ..specs import register

ALIKE = "makes all reach alike; take ntk, yarn or interpolate, with a factor"


class Measured(Position):
    """A scheme that sees other coordinates than its layout gives; subclasses say how an axis of cells is measured.

    The caller's own coordinates, which come from no grid, count the cells of one that they name, or are taken as are.
    """

    own: tuple[int, ...] | None = None

    def __init__(self, layout: Layout, scheme: Position) -> None:
        super().__init__()
        if any(getattr(part, "dynamic", False) for part in scheme.modules()):
            raise ValueError(f"dynamic goes by how far a grid reaches, but {type(self).__name__.lower()} {ALIKE}")
        self.scheme, self.layout = scheme, layout
        for claim in ("relative", "reversible", "keeps_flash", "unbounded", "each_layer"):
            setattr(self, claim, getattr(scheme, claim))

    def axis(self, cells: Tensor, a: int, n: Any) -> Tensor:
        """Where the scheme sees coordinates `cells` along axis a, which has n cells."""
        raise NotImplementedError(f"{type(self).__name__} needs axis()")

    def measure(self, coords: Tensor, grid: Sequence[int]) -> Tensor:
        """Coordinates (…, A) on `grid` as the scheme sees them."""
        return torch.stack([self.axis(coords[..., a], a, n) for a, n in enumerate(grid)], dim=-1)

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        return self.scheme.add(x, coords, grid, layer)

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        sizes = self.own if grid is None else grid
        if sizes is not None:
            coords = self.measure(coords, sizes)
            key_coords = None if key_coords is None else self.measure(key_coords, sizes)
        return self.scheme.encode(coords, key_coords, grid)


@register
class Reference(Measured):
    """A scheme that measures every grid by one of `grid` cells: coordinate c of n cells counts as c / n * grid.

    So an image of any size spans the turns of the size that EVA-02 (arXiv:2303.11331) was trained with. `grid` is the
    training grid unless told otherwise. The caller's own coordinates, which come from no grid, are taken as cells of
    the reference. Raises ValueError for a grid of another number of axes.
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
class Normalize(Measured):
    """A scheme that sees the cells of every axis evenly from `low` to `high`, at which the outermost cells are.

    With `grows`, `high` is that of the training grid of N cells, and n cells end at high * n / N, as LieRE's do
    (arXiv:2406.10322). The caller's own coordinates are taken as places on the training grid. Raises ValueError where
    `low` is `high`.
    """

    def __init__(
        self, layout: Layout, scheme: Position, low: float = -1.0, high: float = 1.0, grows: bool = False
    ) -> None:
        super().__init__(layout, scheme)
        if low == high:
            raise ValueError(f"normalize needs low and high to differ, got {low} for both")
        self.low, self.high, self.grows, self.own = low, high, grows, layout.grid

    def measure(self, coords: Tensor, grid: Sequence[int]) -> Tensor:
        return super().measure(self.layout.cell(coords, grid), grid)

    def axis(self, cells: Tensor, a: int, n: Any) -> Tensor:
        high = self.high * n / self.layout.grid[a] if self.grows else self.high
        return self.low + cells * (high - self.low) / torch.sym_max(n - 1, 1)
