"""Modifiers of rotary schemes, such as `ntk(axial)`: pure functions of frequencies, appended to
what they modify.

A modifier of a sum changes its rotary parts: yarn(sincos + axial) is sincos + yarn(axial). A
modifier of a wrapper changes what is inside, for coordinates as the wrapped scheme sees them:
yarn(reference(axial)) counts revolutions over the reference. Fixed and learned frequencies are
changed alike, and learned parameters keep their names, so a trained model accepts any modifier
without new weights.

Shapes   L layers and H heads (1 if shared), A axes, R channel pairs
"""

from collections.abc import Callable
from typing import cast

from torch import Tensor

from ..base import Layout, Position, Sum, Wrapper
from .base import Rotary

Make = Callable[[Rotary, list[float]], Position]  # a changed scheme, given how far coordinates extend along each axis


def modify(layout: Layout, scheme: Position, name: str, make: Make, dynamic: bool = False) -> Position:
    """The scheme with `make` applied to its rotary parts, the others as they are.

    Raises ValueError where no part is rotary along the axes of the grid, or where a `dynamic`
    change is inside a wrapper that rescales all grids to the same extent.
    """
    leaves: list[Position] = []

    def visit(part: Position, cells: Tensor) -> Position:
        """The part changed, which sees two neighbouring cells at `cells` (2, A)."""
        if isinstance(part, Sum):
            return Sum(*(visit(cast(Position, each), cells) for each in part.parts))
        if isinstance(part, Wrapper):
            if dynamic and part.same_extent:
                raise ValueError(
                    f"{name} depends on how far a grid extends, but {type(part).__name__.lower()} makes all grids "
                    f"extend equally; use ntk, yarn or interpolate, with a factor"
                )
            part.scheme = visit(part.scheme, part.measure(cells, layout.grid))
            return part
        leaves.append(part)
        if not along_axes(part, layout):
            return part
        extent = [n * float(distance) for n, distance in zip(layout.grid, cells.diff(dim=0)[0], strict=True)]
        return make(cast(Rotary, part), extent)

    changed = visit(scheme, layout.neighbors())
    if not any(along_axes(part, layout) for part in leaves):
        kinds = " + ".join(type(part).__name__ for part in leaves)
        raise ValueError(
            f"{name} modifies rotary schemes with frequencies for each axis, such as {name}(axial), not {kinds}"
        )
    return changed


def along_axes(scheme: Position, layout: Layout) -> bool:
    """Whether a scheme rotates by frequencies that it has for each axis of the grid."""
    return isinstance(scheme, Rotary) and scheme.initial.shape[-2] == layout.axes
