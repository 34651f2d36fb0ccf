"""Bookkeeping of channels that trained weights depend on: in which order axes have pairs, at which speeds they turn.

All of it is an order of the columns of `freqs`, or other lengths of them.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base import Layout, Position
from ..specs import register
from .base import LearnedSpeeds, Pairs, Rotary, geometric
from .exact import Exact
from .scaling import Scaled


def _columns(name: str, layout: Layout, scheme: Position, change: Callable[[Tensor], Tensor]) -> Rotary:
    """A rotary scheme whose frequencies (…, A, R) are changed."""
    plain = isinstance(scheme, Rotary) and type(scheme).frequencies in (Rotary.frequencies, Scaled.frequencies)
    if not isinstance(scheme, Rotary) or not plain or scheme.initial.shape[-2] != layout.axes:
        raise ValueError(
            f"{name} modifies a rotary scheme with frequencies for each axis, such as {name}(axial), not "
            f"{type(scheme).__name__}"
        )
    scheme.initial = change(scheme.initial)
    if isinstance(scheme, Exact):
        scheme.exact = change(scheme.exact)
    scheme.reset_parameters()
    return scheme


@register
def xy(layout: Layout, scheme: Position) -> Rotary:
    """A rotary scheme that takes the axes in reverse order: x before y, the first channels to the column."""
    return _columns("xy", layout, scheme, lambda freqs: freqs.flip(-2))


@register
def alternate(layout: Layout, scheme: Position) -> Rotary:
    """A rotary scheme whose axes take turns pair by pair, rather than a block of channels each."""

    def change(freqs: Tensor) -> Tensor:
        blocks = freqs.unflatten(-1, (layout.axes, -1)) if freqs.shape[-1] % layout.axes == 0 else freqs[..., None]
        own = torch.eye(layout.axes, dtype=torch.bool, device=freqs.device)[..., None]
        if blocks.shape[-2] != layout.axes or blocks.masked_select(~own).any():
            raise ValueError("axes alternate where each has as many pairs of its own as the others: alternate(axial)")
        return blocks.transpose(-1, -2).flatten(-2)

    return _columns("alternate", layout, scheme, change)


@register
def spectrum(
    layout: Layout,
    scheme: Position,
    first: float = 1.0,
    last: float = 100.0,
    spacing: Literal["log", "linear"] = "log",
    heads: bool = False,
    learned: bool = False,
) -> Rotary:
    """A rotary scheme whose pairs turn at speeds from `first` to `last`, both included, in radians per unit.

    The pairs that turn along an axis climb in equal ratios or equal differences. With `heads` the heads of a layer
    share one series out, a step to each in turn, and `last` is the step that none takes. With `learned` each layer and
    head learns its own speeds, from these on. Raises ValueError for speeds that are not positive, and where the scheme
    has no frequencies for each axis.
    """
    if min(first, last) <= 0:
        raise ValueError(f"spectrum needs a positive first and last speed, got {first} and {last}")
    if isinstance(scheme, Exact):
        raise ValueError(
            f"spectrum modifies axial and its kin, not {type(scheme).__name__}, which computes its own speeds"
        )

    def change(freqs: Tensor) -> Tensor:
        number, count = (freqs != 0).cumsum(-1) - 1, (freqs != 0).sum(-1, keepdim=True)
        if heads:
            head = torch.arange(layout.heads, device=freqs.device)[:, None, None]
            share = (number * layout.heads + head) / (count * layout.heads).double()
        else:
            share = number / (count - 1).clamp(min=1).double()
        speeds = first * (last / first) ** share if spacing == "log" else first + (last - first) * share
        return (F.normalize(freqs.double(), dim=-2) * speeds).float()

    scheme = _columns("spectrum", layout, scheme, change)
    if not learned:
        return scheme
    if scheme.initial.shape[:2] != (1, 1):
        raise ValueError(
            "spectrum learns the speeds of a scheme whose layers and heads turn alike, such as spectrum(axial)"
        )
    directions, speeds = F.normalize(scheme.initial[0, 0], dim=-2), scheme.initial.norm(dim=-2)
    return LearnedSpeeds(directions, speeds.expand(layout.depth, layout.heads, -1), scheme.pairs)


@register
def mrope(layout: Layout, base: float = 10000.0, blocks: bool = False, idle: int = 0, pairs: Pairs = "half") -> Rotary:
    """One series of frequencies base^(-j/R) over all R pairs of a head, dealt out to the axes in turn.

    Each round of the deal begins with `idle` pairs that stay un-rotated (of axes that images do not have). With
    `blocks` the pairs of an axis then lie together, as in Pixtral (arXiv:2410.07073); else as they were dealt, the
    multimodal RoPE of Qwen2-VL's kin (arXiv:2409.12191).
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
    """LTX-Video's RoPE (arXiv:2501.00103): one series over the width of all heads, in which axes alternate.

    Frequency j of P turns along each axis in turn, at base^(j / (P - 1)) * pi / 2 radians per unit. So each head has
    speeds of its own; what does not divide stays un-rotated, in front. LTX has base 10000, for coordinates in [-1, 1];
    for cells that would be faster than float32 can tell. Raises ValueError where a head's channels are no pairs, or the
    width is too small for its axes.
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
