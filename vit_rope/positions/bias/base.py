"""The base class of bias schemes, which add a function of the displacement to the scaled logits.

Displacements Δ = key - query are in cells of the training grid. To write a scheme, subclass `Bias`
and implement `logits`. On a full grid it is evaluated once for each of the prod(2s - 1)
displacements, and pairs look up their value. Other tokens get a value for each pair.

Shapes   L layers (1 if shared), B samples, H heads, N queries, M keys, A axes,
         T displacements of a grid; Δ (…, A), logits (L, H, …)
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import displacements
from ..base import Layout, Position
from ..encoding import Encoding, RelativeTerm


class Bias(Position):
    """A bias that is a function of the displacement. Subclasses implement `logits`."""

    reversible = True
    keeps_flash = False
    unbounded = False
    costly = False  # True for a network: with dropped tokens too, it runs once for the displacements of the grid

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def logits(self, delta: Tensor) -> Tensor:
        """Return logits (L, H, …) at displacements (…, A)."""
        raise NotImplementedError(f"{type(self).__name__} needs logits()")

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        return self.bias_encoding(self.logits, coords, key_coords, grid)

    def bias_encoding(
        self,
        logits: Callable[[Tensor], Tensor],
        coords: Tensor,
        key_coords: Tensor | None,
        grid: Sequence[int] | None,
    ) -> Encoding:
        """Return the encoding with the biases (B, H, N, M) of the function `logits`.

        If layers differ, each looks up its own bias, so that the biases of all layers are never in
        memory at once.
        """
        if displacements.within_full_grid(coords, key_coords, grid) or (self.costly and grid is not None):
            delta, index = displacements.combine_axes(*displacements.along_axes(self.layout, coords, key_coords, grid))
            values = logits(delta)  # (L, H, T)
            if len(values) > 1:
                return Encoding(term_lists=[[RelativeTerm(table[..., None], index, "logits")] for table in values])
            values = displacements.look_up(values, index)
        else:
            values = logits(displacements.of_pairs(self.layout, coords, key_coords))
        return Encoding(biases=list(values.transpose(1, 2).unbind(0)))  # (L, H, B, N, M)


def length(delta: Tensor, distance: str) -> Tensor:
    """Return the lengths (…) of displacements (…, A): the "euclidean" or the "manhattan" norm."""
    if delta.shape[-1] == 1:  # both norms are equal; compiled graphs of torch 2.9 have no norm()
        return delta[..., 0].abs()
    return delta.norm(dim=-1) if distance == "euclidean" else delta.abs().sum(dim=-1)


def constants(values: Tensor | Sequence[Any], delta: Tensor) -> Tensor:
    """Return constants (…, H) as (…, H, 1 …), on the device and in the dtype of displacements."""
    return torch.as_tensor(values, dtype=delta.dtype, device=delta.device)[(..., *[None] * (delta.ndim - 1))]
