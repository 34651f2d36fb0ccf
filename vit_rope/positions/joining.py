"""Other ways for absolute positions to join the tokens: as a factor, side by side, and before other layers."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .absolute import Learned
from .base import Layout, Position, Sum
from .encoding import Encoding
from .specs import register


@register
class Multiplicative(Learned):
    """A learned vector for every cell that multiplies the token there, x ⊙ (1 + p), from p near 0.

    p is a table as that of `learned`, resampled and read in the same way.
    """

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        return x * (1 + self.places(coords, grid, layer)).to(x.dtype)


@register
class Concat(Position):
    """Token and place side by side, W [x; p], of a learned table of `channels` for every cell.

    This is W_x x + W_p p: a sum again, whose table has fewer channels. W_x begins as the identity. Raises ValueError
    for fewer than 1 channel.
    """

    relative, reversible, extrapolates = False, True, False

    def __init__(self, layout: Layout, channels: int = 64) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"concat needs at least 1 channel, got {channels}")
        self.table = Learned(replace(layout, width=channels, heads=1))
        self.weight = nn.Parameter(torch.empty(layout.width, layout.width + channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.normal_(std=(self.weight.shape[1] - self.weight.shape[0]) ** -0.5)
            self.weight[:, : len(self.weight)] = torch.eye(len(self.weight), device=self.weight.device)

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        places = self.table.places(coords, grid, layer).to(x.dtype).expand(*x.shape[:-1], -1)
        return F.linear(torch.cat((x, places), dim=-1), self.weight.to(x.dtype)).to(x.dtype)


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
        for claim in ("relative", "reversible", "keeps_flash", "extrapolates"):
            setattr(self, claim, getattr(scheme, claim))

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        return self.scheme.add(x, coords, grid, layer) if layer in self.layers else x

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        return self.scheme.encode(coords, key_coords, grid)
