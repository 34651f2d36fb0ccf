"""Conventions of other libraries: the order of axes in a head, and coordinates that a reference grid measures.

Rotary schemes of one formula differ in bookkeeping that trained weights depend on. What is bookkeeping of channels is a
choice of columns of `freqs`; what is bookkeeping of places is a change of coordinates before them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Layout, Position
from .coords import check_shape
from .encoding import Encoding
from .rotary import Rotary
from .specs import register


def _rotary(name: str, layout: Layout, scheme: Position) -> Rotary:
    if not isinstance(scheme, Rotary) or scheme.initial.shape[-2] != layout.axes:
        raise ValueError(f"{name} modifies a rotary scheme with frequencies for each axis, such as {name}(axial)")
    return scheme


@register
def xy(layout: Layout, scheme: Position) -> Rotary:
    """A rotary scheme that takes the axes in reverse order: x before y, the first channels to the column."""
    scheme = _rotary("xy", layout, scheme)
    scheme.initial = scheme.initial.flip(-2)
    scheme.reset_parameters()
    return scheme


@register
class Reference(Position):
    """A scheme that measures every grid by one of `grid` cells: coordinate c of n cells counts as c / n * grid.

    So an image of any size spans the turns of the size that EVA-02 (arXiv:2303.11331) was trained with. `grid` is the
    training grid unless told otherwise. The caller's own coordinates, which come from no grid, are taken as cells of
    the reference. Raises ValueError for a grid of another number of axes.
    """

    def __init__(self, layout: Layout, scheme: Position, grid: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.scheme, self.grid = scheme, layout.grid if grid is None else grid
        for claim in ("relative", "reversible", "keeps_flash", "extrapolates", "each_layer"):
            setattr(self, claim, getattr(scheme, claim))
        check_shape(self.grid)
        if len(self.grid) != layout.axes:
            raise ValueError(f"reference grid {self.grid} has {len(self.grid)} axes, the layout {layout.axes}")

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        return self.scheme.add(x, coords, grid, layer)

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        if grid is not None:
            coords = self.measure(coords, grid)
            key_coords = None if key_coords is None else self.measure(key_coords, grid)
        return self.scheme.encode(coords, key_coords, grid)

    def measure(self, coords: Tensor, grid: Sequence[int]) -> Tensor:
        """Coordinates (…, A) on `grid` in cells of the reference grid."""
        cells = [coords[..., a] / n * m for a, (n, m) in enumerate(zip(grid, self.grid, strict=True))]
        return torch.stack(cells, dim=-1)
