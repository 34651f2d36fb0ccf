"""TODO positions.absolute.base from ['positions.absolute']."""

from collections.abc import Sequence

from torch import Tensor

from ..base import Position, no_autocast


class Absolute(Position):
    """A scheme that gives every place a vector, which is added to the token there."""

    relative = False
    reversible = True

    def vectors(self, coords: Tensor, grid: Sequence[int] | None, layer: int) -> Tensor:
        """Vectors (N, C) or (B, N, C) of coordinates (N, A) or (B, N, A), at least as precise as those."""
        raise NotImplementedError(f"{type(self).__name__} needs vectors()")

    def places(self, coords: Tensor, grid: Sequence[int] | None, layer: int) -> Tensor:
        """The vectors, which autocast does not round."""
        with no_autocast(coords.device):
            return self.vectors(coords, grid, layer)

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        return x + self.places(coords, grid, layer).to(x.dtype)
