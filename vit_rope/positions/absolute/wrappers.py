"""Other ways for absolute positions to join the tokens: as a factor, side by side, and before other layers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..base import Layout, Position, Sum
from ..encoding import Encoding
from ..specs import register


@register
class Gate(Position):
    """A scheme whose addition to the tokens counts as much as one number says: all at 1, nothing at 0.

    The number is learned from `start`, or set from outside, as `training.Fade` does to wean a trained model
    off its table. What the scheme does in attention stays whole.
    """

    def __init__(self, layout: Layout, scheme: Position, start: float = 1.0) -> None:
        super().__init__()
        self.scheme, self.start = scheme, start
        for claim in ("relative", "reversible", "keeps_flash", "unbounded", "each_layer"):
            setattr(self, claim, getattr(scheme, claim))
        self.gate = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gate, self.start)

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        return torch.lerp(x, self.scheme.add(x, coords, grid, layer), self.gate.to(x.dtype))  # exact at 0 and at 1

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        return self.scheme.encode(coords, key_coords, grid)


@register
class Inject(Position):
    """A scheme whose tokens get their places before the layers that are named, from 0 or, if negative, from the end.

    `inject(learned, layers=(-2, -1))` brings absolute places in late, as DeBERTa's enhanced mask decoder does, there to
    the queries alone (arXiv:2006.03654); with layers=(0, -2, -1) they come early and once more. What the scheme does in
    attention stays. Raises ValueError for a layer that does not exist, or a scheme that does nothing to tokens.
    """

    each_layer = True

    def __init__(self, layout: Layout, scheme: Position, layers: tuple[int, ...] = (-1,)) -> None:
        super().__init__()
        wrong = [layer for layer in layers if not -layout.depth <= layer < layout.depth]
        if wrong:
            raise ValueError(f"inject names layer {wrong[0]}, but there are {layout.depth}, counted from 0")
        scheme = scheme.scheme if isinstance(scheme, Inject) else scheme
        if isinstance(scheme, Sum) or type(scheme).add is Position.add:
            raise ValueError(
                "inject needs one scheme that acts on tokens; others join outside, inject(learned) + axial"
            )
        self.scheme, self.layers = scheme, sorted({layer % layout.depth for layer in layers})
        for claim in ("relative", "reversible", "keeps_flash", "unbounded"):
            setattr(self, claim, getattr(scheme, claim))

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        return self.scheme.add(x, coords, grid, layer) if layer in self.layers else x

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        return self.scheme.encode(coords, key_coords, grid)
