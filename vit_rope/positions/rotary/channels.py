"""The order of channel pairs, and the speeds at which they rotate, where trained weights depend on
them.

Shapes   L layers and H heads (1 if shared), A axes, R channel pairs
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base import Layout, Position
from ..specs import register
from .axial import LearnedSpeeds
from .base import Pairs, Rotary, geometric
from .changes import Change
from .exact import Exact
from .modify import modify


@dataclass(frozen=True)
class ReversedAxes(Change):
    """The first row of frequencies becomes the last."""

    permutes = True

    def __call__(self, freqs: Tensor, grid: Sequence[int] | None) -> Tensor:
        return freqs.flip(-2)

    def __str__(self) -> str:
        return "axes reversed"


@dataclass(frozen=True)
class InterleavedAxes(Change):
    """Blocks of pairs, one per axis, become pairs that alternate between the axes."""

    axes: int
    permutes = True

    def __call__(self, freqs: Tensor, grid: Sequence[int] | None) -> Tensor:
        return freqs.unflatten(-1, (self.axes, -1)).transpose(-1, -2).flatten(-2)

    def __str__(self) -> str:
        return "axes alternate"


@dataclass(frozen=True)
class Spectrum(Change):
    """The directions of pairs stay, and their speeds become a series from first to last."""

    first: float
    last: float
    spacing: Literal["log", "linear"]
    heads: int | None  # the number of heads that share one series out, or None for a series in each

    def __call__(self, freqs: Tensor, grid: Sequence[int] | None) -> Tensor:
        rotates = freqs != 0
        number, count = rotates.cumsum(-1) - 1, rotates.sum(-1, keepdim=True)
        if self.heads is None:
            share = number / (count - 1).clamp(min=1).double()
        else:
            head = torch.arange(self.heads, device=freqs.device)[:, None, None]
            share = (number * self.heads + head) / (count * self.heads).double()
        if self.spacing == "log":
            speeds = self.first * (self.last / self.first) ** share
        else:
            speeds = self.first + (self.last - self.first) * share
        return (F.normalize(freqs.double(), dim=-2) * speeds).to(freqs.dtype)

    def __str__(self) -> str:
        return f"spectrum({self.first:g} to {self.last:g})"


@register
def xy(layout: Layout, scheme: Position) -> Position:
    """A rotary scheme with the axes in reverse order: x before y, the first channels to the column.

    Raises ValueError where no part of the scheme has frequencies for each axis.
    """
    return modify(layout, scheme, "xy", lambda part, extent: part.changed(ReversedAxes()))


@register
def alternate(layout: Layout, scheme: Position) -> Position:
    """A rotary scheme whose axes alternate pair by pair, instead of having a block of pairs each.

    Raises ValueError where the axes do not have equally many pairs of their own.
    """

    def make(part: Rotary, extent: list[float]) -> Position:
        freqs = part.initial_frequencies()
        if freqs.shape[-1] % layout.axes == 0:
            blocks = freqs.unflatten(-1, (layout.axes, -1))  # (L, H, A, A, R / A)
            same_axis = torch.eye(layout.axes, dtype=torch.bool, device=freqs.device)[..., None]
            if not blocks.masked_select(~same_axis).any():
                return part.changed(InterleavedAxes(layout.axes))
        raise ValueError("alternate needs as many pairs of its own for each axis, as in alternate(axial)")

    return modify(layout, scheme, "alternate", make)


@register
def spectrum(
    layout: Layout,
    scheme: Position,
    first: float = 1.0,
    last: float = 100.0,
    spacing: Literal["log", "linear"] = "log",
    heads: bool = False,
    learned: bool = False,
) -> Position:
    """A rotary scheme whose pairs rotate at speeds from `first` to `last`, both included, in
    radians per unit.

    The speeds of the pairs along an axis have equal ratios ("log") or equal differences ("linear").
    With `heads` the heads of a layer share one series, each taking the next element, and `last` is
    the element after the end. With `learned` each layer and head learns its own speeds, which start
    at these values. Raises ValueError for speeds that are not positive, and where no part of the
    scheme has frequencies for each axis.
    """
    if min(first, last) <= 0:
        raise ValueError(f"spectrum needs a positive first and last speed, got {first} and {last}")

    def make(part: Rotary, extent: list[float]) -> Position:
        if isinstance(part, Exact):
            raise ValueError(f"spectrum cannot modify {type(part).__name__}, which computes its own speeds")
        part = part.changed(Spectrum(first, last, spacing, layout.heads if heads else None))
        if not learned:
            return part
        freqs = part.initial_frequencies()
        if freqs.shape[:2] != (1, 1):
            raise ValueError(
                "spectrum(learned=True) needs a scheme whose layers and heads rotate alike, such as spectrum(axial)"
            )
        speeds = freqs.norm(dim=-2).expand(layout.depth, layout.heads, -1)
        return LearnedSpeeds(F.normalize(freqs[0, 0], dim=-2), speeds, part.pairs)

    return modify(layout, scheme, "spectrum", make)


@register
def mrope(layout: Layout, base: float = 10000.0, blocks: bool = False, idle: int = 0, pairs: Pairs = "half") -> Rotary:
    """One series of frequencies base^(-j/R) over all R pairs of a head, assigned to the axes in a
    cycle.

    Each cycle starts with `idle` pairs that do not rotate (for axes that images do not have). With
    `blocks` the pairs of an axis are then grouped, as in Pixtral (arXiv:2410.07073); otherwise they
    stay interleaved, the multimodal RoPE of Qwen2-VL and later models (arXiv:2409.12191). Raises
    ValueError for a negative idle, a base that is not positive or an odd head_dim.
    """
    if idle < 0 or base <= 0 or layout.head_dim % 2:
        raise ValueError(f"mrope needs idle >= 0, base > 0 and an even head_dim, got {idle}, {base}, {layout.head_dim}")
    series = geometric(layout.head_dim // 2, base)
    axis = torch.arange(len(series), device="cpu") % (idle + layout.axes) - idle
    freqs = torch.stack([torch.where(axis == a, series, 0.0) for a in range(layout.axes)])
    if blocks:
        freqs = freqs[:, axis.argsort(stable=True)]
    return Rotary(freqs[None, None], pairs)


@register
def ltx(layout: Layout, base: float = 10.0) -> Rotary:
    """LTX-Video's RoPE (arXiv:2501.00103): one series over the width of all heads, in which the
    axes alternate.

    Frequency j of P serves each axis in turn, at base^(j / (P - 1)) * pi / 2 radians per unit, so
    each head has its own speeds. Channels that do not divide are not rotated; they come first. LTX
    uses base 10000 with coordinates in [-1, 1]; for cells that is faster than float32 can resolve.
    Raises ValueError where a head has an odd number of channels, or the width is too small for its
    axes.
    """
    axes, width = layout.axes, layout.heads * layout.head_dim
    count = width // (2 * axes)
    if count == 0 or base <= 0 or layout.head_dim % 2:
        raise ValueError(
            f"ltx needs base > 0, an even head_dim and a width of {2 * axes} or more, got {base}, {layout.head_dim} "
            f"and {width}"
        )
    series = base ** torch.linspace(0.0, 1.0, count, dtype=torch.float32, device="cpu") * math.pi / 2
    freqs = torch.diag_embed(series[:, None].expand(-1, axes)).transpose(0, 1).flatten(1)
    freqs = F.pad(freqs, (width // 2 - count * axes, 0))
    return Rotary(freqs.unflatten(1, (layout.heads, -1)).transpose(0, 1)[None])
