"""Rotary position embedding along any number of axes.

Channel pairs of queries and keys turn by angles that are linear in the token's coordinates,

    angle[token, pair] = sum_a coords[token, a] * freqs[a, pair],

so that a query-key product sees two positions through their displacement alone. Every scheme whose rotations commute is
one choice of `freqs`: one axis for each pair is axial RoPE, all axes in every pair is mixed RoPE, rows of (W f, f) are
RoPE over the flattened image. To add one, return `Rotary(freqs)` from a function decorated with `@register`.

Shapes   L layers and H heads (1 if shared), N tokens, A axes, R pairs of the D channels of a head
Units    coordinates as the layout has them, freqs in radians per unit
Pairs    `interleaved`: channels 2j and 2j + 1 turn together, the block-diagonal matrix as derived; `half`: j and j + R;
         `axis`: as half, but within the channels of each axis
Sources  RoFormer, arXiv:2104.09864 (one axis); RoPE-ViT, arXiv:2403.13298 (axial, mixed)
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..base import Layout
from ..encoding import Encoding
from ..specs import register
from .base import LearnedSpeeds, Pairs, Rotary, geometric


@register
def axial(
    layout: Layout,
    base: float | tuple[float, ...] = 100.0,
    share: Literal["equal", "rest", "first", "last"] | tuple[int, ...] = "equal",
    pairs: Pairs = "interleaved",
    fastest: float = 1.0,
    learned: bool = False,
) -> Rotary:
    """Each axis turns channel pairs of its own: of two axes, half the head by the row, half by the column.

    The frequencies of an axis with P pairs are `fastest` * base^(-j/P), j = 0 … P - 1, in radians per unit; `base` may
    be one for each axis. `share` deals out the head's channels: "equal" is the same for every axis and must divide;
    "rest" leaves what does not divide un-rotated, at the end; "first" and "last" give it to that axis; a tuple such as
    (16, 24, 24) gives each axis its own even number of channels, the rest staying un-rotated. With learned=True every
    layer and head learns its own frequencies, from these on. Raises ValueError where the head's channels cannot be
    dealt out so (arXiv:2403.13298, RoPE-Axial; arXiv:2401.11605 learns them).
    """
    counts = _deal(layout, share)
    bases = base if isinstance(base, tuple) else (base,) * layout.axes
    if len(bases) != layout.axes:
        raise ValueError(f"{len(bases)} bases for {layout.axes} axes; give one number, or one for each axis")
    if min(bases) <= 0 or fastest <= 0:
        raise ValueError(f"axial needs a positive base and fastest, got base {base} and fastest {fastest}")
    freqs = torch.zeros(1, 1, layout.axes, sum(counts), dtype=torch.float64, device="cpu")
    start = 0
    for axis, (count, axis_base) in enumerate(zip(counts, bases, strict=True)):
        freqs[..., axis, start : start + count] = fastest * geometric(count, axis_base)
        start += count
    if learned:
        return LearnedSpeeds(freqs[0, 0].sign(), freqs.sum(dim=2).expand(layout.depth, layout.heads, -1), pairs)
    return Rotary(freqs, pairs)


def _deal(layout: Layout, share: str | tuple[int, ...]) -> list[int]:
    """How many of a head's channel pairs each axis turns."""
    head, axes = layout.head_dim, layout.axes
    if isinstance(share, tuple):
        if len(share) != axes:
            raise ValueError(f"share {share} names {len(share)} axes, but the grid has {axes}")
        if min(share) < 0 or any(n % 2 for n in share) or not 0 < sum(share) <= head:
            raise ValueError(f"share {share} must be even numbers of channels that sum to at most head_dim {head}")
        return [n // 2 for n in share]
    _check_even(head)
    each, left = divmod(head // 2, axes)
    if each == 0:
        raise ValueError(
            f"head_dim {head} is too small for {axes} axes: each axis needs at least one pair of channels, "
            f"so use a head_dim of {2 * axes} or more"
        )
    if left and share == "equal":
        low, high = each * axes * 2, (each + 1) * axes * 2
        raise ValueError(
            f"head_dim {head} does not divide into equal pairs for {axes} axes; use a head_dim of {low} or {high}, "
            f'or say what to do with the rest: share="rest", "first", "last" or a tuple of channels'
        )
    counts = [each] * axes
    if share in ("first", "last"):
        counts[0 if share == "first" else -1] += left
    return counts


def _check_even(head: int) -> None:
    if head % 2:
        raise ValueError(
            f"rotations turn pairs of channels, so head_dim must be even, got {head}; "
            f"use a width and a number of heads that give {head - 1} or {head + 1}"
        )


@register
def mixed(
    layout: Layout, base: float = 10.0, learned: bool = True, pairs: Pairs = "interleaved", fastest: float = 1.0
) -> Rotary:
    """Every pair turns along a direction of its own, for each layer and head, learned unless told otherwise.

    Begins as RoPE-Mixed does (arXiv:2403.13298): a random rotation of the axes for each layer and head, an equal share
    of the pairs along each rotated axis, and in each share speeds `fastest` * base^(-j/P), in radians per unit. With
    learned=False the rotations are always the same ones. Raises ValueError for an odd head_dim or one too small.
    """
    _check_even(layout.head_dim)
    count, axes = layout.head_dim // 2, layout.axes
    if count < axes:
        raise ValueError(f"head_dim {layout.head_dim} is too small for {axes} axes; use {2 * axes} or more")
    if base <= 0 or fastest <= 0:
        raise ValueError(f"mixed needs a positive base and fastest, got base {base} and fastest {fastest}")
    generator = None if learned else torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(layout.depth, layout.heads, axes, axes, dtype=torch.float64, device="cpu", generator=generator)
    rotations, triangle = torch.linalg.qr(noise)
    rotations = rotations * triangle.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]  # else QR prefers some directions
    rotations[..., -1] *= torch.linalg.det(rotations).sign()[..., None]  # a rotation, not a reflection
    share = [count // axes + (axis < count % axes) for axis in range(axes)]
    freqs = [rotations[..., [axis]] * geometric(n, base) for axis, n in enumerate(share)]
    return Rotary(fastest * torch.cat(freqs, dim=-1), pairs, learned)


@register
class Flat(Rotary):
    """One-dimensional RoPE over the flattened grid, at row * W + column (arXiv:2104.09864): a baseline.

    It is relative in that number, but counts the last cell of a row and the first of the next as neighbours. W is that
    of the grid which the tokens come from, or of the training grid for coordinates from no grid. Raises ValueError for
    an odd head_dim.
    """

    def __init__(self, layout: Layout, base: float = 10000.0, pairs: Pairs = "interleaved") -> None:
        _check_even(layout.head_dim)
        if base <= 0:
            raise ValueError(f"flat needs a positive base, got {base}")
        super().__init__(geometric(layout.head_dim // 2, base)[None, None, None], pairs)
        self.layout = layout

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        keys = None if key_coords is None else self.layout.flatten(key_coords, grid)
        return super().encode(self.layout.flatten(coords, grid), keys, None)
