"""Other ways for a scheme's absolute positions to join the tokens: gated, or before other layers.

Shapes   B samples, N tokens, C channels, A axes; tokens (B, N, C), coordinates (N, A) or (B, N, A)
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..base import Composed, Layout, Position, Sum, Wrapper
from ..specs import register


@register
class Gate(Wrapper):
    """A scheme whose addition to the tokens is weighted by one number: complete at 1, nothing at 0.

    The number is learned from `start`, or set from outside: `training.Fade` fades out the table of
    a trained model. What the scheme does in attention is not weighted.
    """

    def __init__(self, layout: Layout, scheme: Position, start: float = 1.0) -> None:
        super().__init__(scheme)
        self.start = start
        self.gate = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gate, self.start)

    def claims_besides(self, claim: Literal["reversible", "unbounded"]) -> bool:
        if self.start != 0:
            return super().claims_besides(claim)
        parts = (part for part in self.scheme.modules() if isinstance(part, Position))
        attending = (p for p in parts if not isinstance(p, Composed) and type(p).add is Position.add)
        return any(part.claims_besides(claim) for part in attending)  # a closed gate adds nothing to the tokens

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        return torch.lerp(x, self.scheme.add(x, coords, grid, layer), self.gate.to(x.dtype))  # exact at 0 and at 1


@register
class Inject(Wrapper):
    """A scheme whose positions are added before the layers that are named, from 0 or, if negative,
    from the end.

    `inject(learned, layers=(-2, -1))` adds absolute positions late, as DeBERTa's enhanced mask
    decoder does (arXiv:2006.03654), there to the queries only; with layers=(0, -2, -1) they are
    added early and again late. What the scheme does in attention stays. Raises ValueError for a
    layer that does not exist, or a scheme that does not act on tokens.
    """

    each_layer = True

    def __init__(self, layout: Layout, scheme: Position, layers: tuple[int, ...] = (-1,)) -> None:
        wrong = [layer for layer in layers if not -layout.depth <= layer < layout.depth]
        if wrong:
            raise ValueError(f"inject names layer {wrong[0]}, but there are {layout.depth}, counted from 0")
        scheme = scheme.scheme if isinstance(scheme, Inject) else scheme
        if isinstance(scheme, Sum) or type(scheme).add is Position.add:
            raise ValueError(
                "inject needs one scheme that acts on tokens; others join outside, inject(learned) + axial"
            )
        super().__init__(scheme)
        self.layers = sorted({layer % layout.depth for layer in layers})

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        return self.scheme.add(x, coords, grid, layer) if layer in self.layers else x
