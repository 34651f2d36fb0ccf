"""The rotary schemes that others are compared with: axial, mixed, and RoPE over the flattened grid.

Shapes   L layers and H heads (1 if shared), A axes, R channel pairs; frequencies (L, H, A, R) in
         radians per unit of the coordinates
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..base import Layout
from ..encoding import Encoding
from ..specs import register
from .base import Pairs, Rotary, geometric


class LearnedSpeeds(Rotary):
    """A Rotary along fixed `directions` (A, R) at learned `speeds` (L, H, R), which start at the
    given values; `reset_parameters` takes others from `draw_speeds`, if given.
    """

    def __init__(
        self,
        directions: Tensor,
        speeds: Tensor,
        pairs: Pairs = "interleaved",
        draw_speeds: Callable[[], Tensor] | None = None,
    ) -> None:
        super().__init__(directions * speeds[:, :, None], pairs)
        self.directions = directions.to("cpu", torch.float32)
        self.initial_speeds = speeds.to("cpu", torch.float32)
        self.speeds = nn.Parameter(torch.empty(speeds.shape, dtype=torch.float32))
        self.draw_speeds: Callable[[], Tensor] | None = None
        self.reset_parameters()
        self.draw_speeds = draw_speeds  # not for the start, which is given

    def reset_parameters(self) -> None:
        if self.draw_speeds is not None:
            self.initial_speeds = self.draw_speeds().to("cpu", torch.float32)
            self.initial = self.directions * self.initial_speeds[:, :, None]
        with torch.no_grad():
            self.speeds.copy_(self.initial_speeds)

    def base_frequencies(self, coords: Tensor) -> Tensor:
        return self.speeds.to(coords.dtype)[:, :, None] * self.directions.to(coords.device, coords.dtype)


class RandomFrequencies(Rotary):
    """A Rotary with learned frequencies, which start at those that `draw()` returns (L, H, A, R),
    and at others after `reset_parameters`.
    """

    def __init__(self, draw: Callable[[], Tensor], pairs: Pairs = "interleaved") -> None:
        super().__init__(draw(), pairs, learned=True)
        self.draw = draw

    def reset_parameters(self) -> None:
        self.initial = self.draw().to("cpu", torch.float32)
        super().reset_parameters()


@register
def axial(
    layout: Layout,
    base: float | tuple[float, ...] = 100.0,
    share: Literal["equal", "rest", "first", "last"] | tuple[int, ...] = "equal",
    pairs: Pairs = "interleaved",
    fastest: float = 1.0,
    learned: bool = False,
) -> Rotary:
    """Each axis rotates its own channel pairs: with two axes, half of the head by the row, half by
    the column.

    The frequencies of an axis with P pairs are `fastest` * base^(-j/P), j = 0 … P - 1, in radians
    per unit; `base` may be one number per axis. `share` divides the head's channels: "equal" is the
    same for every axis and must divide; "rest" leaves the remainder un-rotated, at the end; "first"
    and "last" give it to that axis; a tuple such as (16, 24, 24) gives each axis its own even
    number of channels and leaves the others un-rotated. pairs="axis" needs equal shares. With
    learned=True every layer and head learns its own frequencies, which start at these. Raises
    ValueError where the head's channels cannot be divided so (RoPE-Axial, arXiv:2403.13298; learned
    frequencies, arXiv:2401.11605).
    """
    counts = _split_pairs(layout, share)
    bases = base if isinstance(base, tuple) else (base,) * layout.axes
    if len(bases) != layout.axes:
        raise ValueError(f"{len(bases)} bases for {layout.axes} axes; give one number, or one for each axis")
    if min(bases) <= 0 or fastest <= 0:
        raise ValueError(f"axial needs a positive base and fastest, got base {base} and fastest {fastest}")
    if pairs == "axis" and len(set(counts)) > 1:
        channels = tuple(2 * count for count in counts)
        raise ValueError(f'pairs="axis" needs as many channels for each axis, got {channels}; use pairs="half"')
    freqs = torch.zeros(1, 1, layout.axes, sum(counts), dtype=torch.float64, device="cpu")
    start = 0
    for axis, (count, axis_base) in enumerate(zip(counts, bases, strict=True)):
        freqs[..., axis, start : start + count] = fastest * geometric(count, axis_base)
        start += count
    if learned:
        return LearnedSpeeds(freqs[0, 0].sign(), freqs.sum(dim=2).expand(layout.depth, layout.heads, -1), pairs)
    return Rotary(freqs, pairs)


def _split_pairs(layout: Layout, share: str | tuple[int, ...]) -> list[int]:
    """How many of a head's channel pairs each axis rotates."""
    head, axes = layout.head_dim, layout.axes
    if isinstance(share, tuple):
        if len(share) != axes:
            raise ValueError(f"share {share} names {len(share)} axes, but the grid has {axes}")
        if min(share) < 0 or any(n % 2 for n in share) or not 0 < sum(share) <= head:
            raise ValueError(f"share {share} must be even numbers of channels that sum to at most head_dim {head}")
        return [n // 2 for n in share]
    check_even(head)
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
            f'or choose what happens to the rest: share="rest", "first", "last" or a tuple of channels'
        )
    counts = [each] * axes
    if share in ("first", "last"):
        counts[0 if share == "first" else -1] += left
    return counts


def check_even(head: int) -> None:
    """Raise ValueError for heads that cannot be split into pairs of channels."""
    if head % 2:
        raise ValueError(
            f"rotations act on pairs of channels, so head_dim must be even, got {head}; "
            f"use a width and a number of heads that give {head - 1} or {head + 1}"
        )


@register
def mixed(
    layout: Layout, base: float = 10.0, learned: bool = True, pairs: Pairs = "interleaved", fastest: float = 1.0
) -> Rotary:
    """Every pair rotates along its own direction, one for each layer and head, learned by default.

    Initialised like RoPE-Mixed (arXiv:2403.13298): a random rotation of the axes for each layer and
    head, an equal share of the pairs along each rotated axis, and in each share speeds `fastest` *
    base^(-j/P), in radians per unit. With learned=False the random rotations are always the same.
    Raises ValueError for an odd head_dim or one that is too small.
    """
    check_even(layout.head_dim)
    if layout.head_dim < 2 * layout.axes:
        low = 2 * layout.axes
        raise ValueError(f"head_dim {layout.head_dim} is too small for {layout.axes} axes; use {low} or more")
    if base <= 0 or fastest <= 0:
        raise ValueError(f"mixed needs a positive base and fastest, got base {base} and fastest {fastest}")
    draw = functools.partial(_random_directions, layout, base, fastest, learned)
    return RandomFrequencies(draw, pairs) if learned else Rotary(draw(), pairs)


def _random_directions(layout: Layout, base: float, fastest: float, learned: bool) -> Tensor:
    """Frequencies (L, H, A, R) of `mixed`; always the same if they are not learned."""
    count, axes = layout.head_dim // 2, layout.axes
    generator = None if learned else torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(layout.depth, layout.heads, axes, axes, dtype=torch.float64, device="cpu", generator=generator)
    rotations, triangle = torch.linalg.qr(noise)
    rotations = (
        rotations * triangle.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    )  # without it QR prefers some directions
    rotations[..., -1] *= torch.linalg.det(rotations).sign()[..., None]  # a rotation, not a reflection
    share = [count // axes + (axis < count % axes) for axis in range(axes)]
    freqs = [rotations[..., [axis]] * geometric(n, base) for axis, n in enumerate(share)]
    return fastest * torch.cat(freqs, dim=-1)


@register
class Flat(Rotary):
    """One-dimensional RoPE over the flattened grid, at row * W + column (arXiv:2104.09864): a
    baseline.

    It is relative in that number, but treats the last cell of a row as adjacent to the first of the
    next. W is the width of the grid that the tokens come from, or of the training grid for
    coordinates from no grid. Angles are formed in float64, except on devices without it and in
    exported graphs: in float32 a cosine is off by 0.4 at 4096 x 4096 cells. Raises ValueError for
    an odd head_dim.
    """

    def __init__(self, layout: Layout, base: float = 10000.0, pairs: Pairs = "interleaved") -> None:
        check_even(layout.head_dim)
        if base <= 0:
            raise ValueError(f"flat needs a positive base, got {base}")
        super().__init__(geometric(layout.head_dim // 2, base)[None, None, None], pairs)
        self.layout = layout

    def radians_per_cell(self, cells: Tensor) -> Tensor:
        rows = torch.diag_embed(cells.diff(dim=0)[0].double())
        numbers = self.layout.flatten(rows) - self.layout.flatten(torch.zeros_like(rows))  # (A, 1): cells per step
        return self.initial_frequencies().double() * numbers

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        keys = None if key_coords is None else self.layout.flatten(_precise(key_coords), grid)
        encoding = super().encode(self.layout.flatten(_precise(coords), grid), keys, None)
        k = None if encoding.k is None else encoding.k.rounded(coords.dtype)
        return encoding._replace(q=encoding.q.rounded(coords.dtype), k=k)


def _precise(coords: Tensor) -> Tensor:
    """Coordinates in float64, for numbers of cells, which are larger than coordinates."""
    exported = torch.jit.is_tracing() or torch.compiler.is_exporting()
    return coords.double() if coords.device.type in ("cpu", "cuda") and not exported else coords
