"""TODO positions.bias.base from ['positions.bias']."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import displacements
from ..base import Layout, Position
from ..encoding import Encoding, RelativeTerm


class Bias(Position):
    """A bias that is a function of the displacement, which subclasses write as `logits`."""

    reversible = True
    keeps_flash = False
    unbounded = False
    costly = False  # whether a network of this size must not run on pairs: dropped tokens then look up their grid's

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def logits(self, delta: Tensor) -> Tensor:
        """Logits (L, H, …) of displacements (…, A)."""
        raise NotImplementedError(f"{type(self).__name__} needs logits()")

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        return self.placed(self.logits, coords, key_coords, grid)

    def placed(
        self,
        logits: Callable[[Tensor], Tensor],
        coords: Tensor,
        key_coords: Tensor | None,
        grid: Sequence[int] | None,
    ) -> Encoding:
        """The biases (B, H, N, M) of each layer, which layers that differ look up for themselves, one at a time."""
        if displacements.is_whole(coords, key_coords, grid) or (self.costly and grid is not None):
            delta, index = displacements.across_axes(*displacements.along_axes(self.layout, coords, key_coords, grid))
            values = logits(delta)  # (L, H, T)
            if len(values) > 1:
                return Encoding(term_lists=[[RelativeTerm(table[..., None], index, "logits")] for table in values])
            values = displacements.look_up(values, index)
        else:
            values = logits(displacements.of_pairs(self.layout, coords, key_coords))
        return Encoding(biases=list(values.transpose(1, 2).unbind(0)))  # (L, H, B, N, M)


def length(delta: Tensor, distance: str) -> Tensor:
    """Lengths (…) of displacements (…, A)."""
    if delta.shape[-1] == 1:  # where all distances are one, and compiled graphs of torch 2.9 have no norm
        return delta[..., 0].abs()
    return delta.norm(dim=-1) if distance == "euclidean" else delta.abs().sum(dim=-1)


def constants(values: Tensor | Sequence[Any], delta: Tensor) -> Tensor:
    """Constants (…, H), on the device and in the type of displacements (…, A), as (…, H, 1 …)."""
    return torch.as_tensor(values, dtype=delta.dtype, device=delta.device)[(..., *[None] * (delta.ndim - 1))]
