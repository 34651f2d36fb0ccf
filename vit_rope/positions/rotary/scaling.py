"""Rotary schemes on grids larger than that of training: modifiers such as "ntk(axial, factor=2)" or
"dynamic(mixed)".

Beyond the training grid the slow pairs reach angles that no layer has seen. Each modifier lowers
frequencies according to how many times farther coordinates extend than in training, a factor that
may differ between axes. `interpolate` divides all frequencies alike; `ntk` divides the slowest most
and the fastest not at all; `yarn` divides those that complete less than a revolution over the
training grid; `dynamic` is `ntk` with the factor taken from the current grid.

Shapes   L layers and H heads (1 if shared), A axes, R channel pairs; factors and extents (A,)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from ..base import Layout, Position
from ..coords import growth
from ..specs import register
from .base import Rotary
from .changes import Change
from .modify import modify

Factor = float | tuple[float, ...]
Rule = Callable[[Tensor, Sequence[Any], Sequence[float]], Tensor]  # of frequencies, factors and extent in training


@dataclass(frozen=True)
class Scaled(Change):
    """Frequencies lowered by a rule, by the factor of each axis.

    With `dynamic`, factor f becomes 1 + f (s - 1) on a grid that extends s >= 1 times as far as
    that of training; it is 1 for coordinates without a grid. `extent` is how far coordinates extend
    along each axis in training.
    """

    name: str
    rule: Rule
    factor: tuple[float, ...]
    extent: tuple[float, ...]
    layout: Layout
    dynamic: bool = False  # pyrefly: ignore[bad-override]
    scale: float = 1.0  # pyrefly: ignore[bad-override]

    def factors(self, grid: Sequence[int] | None) -> Sequence[Any]:
        """The factor of each axis for coordinates on a grid."""
        if not self.dynamic:
            return self.factor
        grown = [1.0] * self.layout.axes if grid is None else growth(self.layout.grid, grid, self.layout.unit)
        return [1 + factor * (torch.sym_max(s, 1.0) - 1) for factor, s in zip(self.factor, grown, strict=True)]

    def __call__(self, freqs: Tensor, grid: Sequence[int] | None) -> Tensor:
        return self.rule(freqs, self.factors(grid), self.extent)

    def __str__(self) -> str:
        return f"{self.name}(factor={self.factor[0] if len(set(self.factor)) == 1 else self.factor:})"


@register
def interpolate(layout: Layout, scheme: Position, factor: Factor = 2.0) -> Position:
    """All frequencies are divided by the factor, as if the larger grid were squeezed into the
    smaller (arXiv:2306.15595).

    Raises ValueError, as all modifiers do, for a factor that is not positive or is for another
    number of axes, and where no part of the scheme is rotary along the axes of the grid.
    """
    return _scale(layout, scheme, "interpolate", interpolated, factor)


@register
def ntk(layout: Layout, scheme: Position, factor: Factor = 2.0) -> Position:
    """The base grows such that the fastest pair of each axis stays and the slowest is divided by
    the factor.

    "NTK-aware" scaling: base * s^(P / (P - 1)) for P pairs on an axis. Pairs that rotate along
    several axes are ranked by the logarithm of their speed, which is the same for geometric
    frequencies.
    """
    return _scale(layout, scheme, "ntk", ntk_aware, factor)


@register
def dynamic(layout: Layout, scheme: Position, factor: Factor = 1.0) -> Position:
    """`ntk` by the current grid: factor * s - (factor - 1) where it extends s times as far as in
    training.

    On smaller grids, or without a grid, nothing changes, so a model can be trained with it.
    """
    return _scale(layout, scheme, "dynamic", ntk_aware, factor, dynamic=True)


@register
def yarn(
    layout: Layout,
    scheme: Position,
    factor: Factor = 2.0,
    slow: float = 0.5,
    fast: float = 2.0,
    temperature: float = 0.1,
) -> Position:
    """Pairs that complete `fast` revolutions over the training grid stay, those below `slow` are
    interpolated (arXiv:2309.00071).

    In between, the share grows with the number of revolutions, counted from one corner of the grid
    to the opposite one. Half a revolution shows all phases to attention that looks both ways; the
    paper's 1 and 32 are for texts. Logits are multiplied by (temperature * ln s + 1)² with s the
    geometric mean of the factors, and stay as they are where s is below 1. Raises ValueError also
    unless 0 <= slow < fast and temperature >= 0.
    """
    if not 0 <= slow < fast or temperature < 0:
        raise ValueError(f"yarn needs 0 <= slow < fast and temperature >= 0, got {slow}, {fast} and {temperature}")
    rule = partial(by_parts, slow=slow, fast=fast)
    return _scale(layout, scheme, "yarn", rule, factor, temperature=temperature)


# ---- rules --------------------------------------------------------------------------------------


def interpolated(freqs: Tensor, factors: Sequence[Any], extent: Sequence[float]) -> Tensor:
    """Frequencies (L, H, A, R) divided by the factor of each axis."""
    return torch.stack([freqs[..., a, :] / factor for a, factor in enumerate(factors)], dim=-2)


def ntk_aware(freqs: Tensor, factors: Sequence[Any], extent: Sequence[float]) -> Tensor:
    """Frequencies divided by factor^r, where r ranks a pair among those of the axis: 0 for the
    fastest, 1 slowest.
    """
    rank = ranks(freqs.detach())
    return torch.stack([freqs[..., a, :] * factor ** -rank[..., a, :] for a, factor in enumerate(factors)], dim=-2)


def ranks(freqs: Tensor) -> Tensor:
    """The logarithm of a pair's speed, scaled to 0 for the fastest and 1 for the slowest pair of
    each axis.
    """
    speed = freqs.norm(dim=-2, keepdim=True).clamp(min=torch.finfo(freqs.dtype).tiny)
    rotates = freqs != 0
    fastest = torch.where(rotates, speed, speed.amin()).amax(dim=-1, keepdim=True)
    slowest = torch.where(rotates, speed, speed.amax()).amin(dim=-1, keepdim=True)
    spread = (fastest / slowest).log()
    single = spread < 1e-6  # one speed, which is as slow as it is fast
    return torch.where(single, 1.0, (fastest / speed).log() / torch.where(single, 1.0, spread))


def by_parts(freqs: Tensor, factors: Sequence[Any], extent: Sequence[float], slow: float, fast: float) -> Tensor:
    """Frequencies of which those with few revolutions over the training extent are divided by the
    factors.
    """
    angle = sum(freqs.detach()[..., a, :].abs() * length for a, length in enumerate(extent))
    revolutions = cast(Tensor, angle) / (2 * math.pi)
    kept = ((revolutions - slow) / (fast - slow)).clamp(0, 1)[..., None, :]
    return freqs * kept + interpolated(freqs, factors, extent) * (1 - kept)


def _scale(
    layout: Layout,
    scheme: Position,
    name: str,
    rule: Rule,
    factor: Factor,
    dynamic: bool = False,
    temperature: float = 0.0,
) -> Position:
    """The scheme with its rotary parts scaled by a rule; the logits are scaled once, however many
    parts there are.
    """
    factors = factor if isinstance(factor, tuple) else (factor,) * layout.axes
    if len(factors) != layout.axes or min(factors) <= 0:
        raise ValueError(f"factor is a positive number, or one for each of {layout.axes} axes, got {factor}")
    scales = iter([(temperature * max(0.0, sum(map(math.log, factors)) / layout.axes) + 1) ** 2])

    def make(part: Rotary, extent: list[float]) -> Position:
        return part.changed(Scaled(name, rule, factors, tuple(extent), layout, dynamic, next(scales, 1.0)))

    return modify(layout, scheme, name, make, dynamic)
