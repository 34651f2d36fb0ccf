"""The base class of absolute schemes, which add a vector to each token.

Shapes   B samples, N tokens, A axes, C channels of a token; vectors (N, C) or (B, N, C)
"""

from collections.abc import Sequence

from torch import Tensor

from ..base import Position, no_autocast


class Absolute(Position):
    """A scheme that adds a vector to each token. Subclasses implement `vectors`."""

    relative = False
    reversible = True
    unbounded = True

    def vectors(self, coords: Tensor, grid: Sequence[int] | None, layer: int) -> Tensor:
        """Return vectors (N, C) or (B, N, C) at coordinates (N, A) or (B, N, A).

        Their precision is at least that of the coordinates.
        """
        raise NotImplementedError(f"{type(self).__name__} needs vectors()")

    def embedding(self, coords: Tensor, grid: Sequence[int] | None, layer: int) -> Tensor:
        """Return `vectors`, computed without autocast, which would round them."""
        with no_autocast(coords.device):
            return self.vectors(coords, grid, layer)

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        return x + self.embedding(coords, grid, layer).to(x.dtype)
