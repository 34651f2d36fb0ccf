"""Rotary schemes on grids larger than that of training: modifiers, written "ntk(axial, factor=2)" or "dynamic(mixed)".

Beyond the training grid the slow pairs reach angles that no layer has seen. Each modifier lowers frequencies by how
many times farther coordinates reach than in training, a factor that may be another for each axis: `interpolate` divides
all alike, `ntk` the slowest most and the fastest not at all, `yarn` those that made less than a turn over the training
grid; `dynamic` is `ntk` by what the grid at hand says. They hold for fixed and for learned frequencies, which keep
their names in a state dict: a trained model takes any of them without other weights. A modifier of a sum changes its
rotary parts: yarn(sincos + axial) is sincos + yarn(axial). One of a scheme that measures its grids changes what is
inside: yarn(reference(axial)) counts turns over the reference.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor

from .. import coords as places
from ..base import Layout, Position, Sum
from ..encoding import Encoding
from ..specs import register
from .base import Rotary
from .coordinates import ALIKE, Measured
from .exact import Exact

Factor = float | tuple[float, ...]
Rule = Callable[[Tensor, Sequence[Any], Sequence[float]], Tensor]  # of frequencies, factors and reach in training


class Scaled(Rotary):
    """A rotary scheme whose frequencies a rule lowers by the factor of each axis, under the same parameter names.

    With `dynamic`, factor f makes that 1 + f (s - 1) on a grid that reaches s >= 1 times as far as that of training; it
    is 1 for coordinates without a grid. A temperature t makes logits (t ln s + 1)² times as large, s being the
    geometric mean of the factors. `reach` is how far coordinates reach along each axis in training.
    """

    def __init__(
        self,
        layout: Layout,
        scheme: Rotary,
        reach: Sequence[float],
        rule: Rule,
        factor: Factor,
        dynamic: bool = False,
        temperature: float = 0.0,
    ) -> None:
        super().__init__(scheme.initial, scheme.pairs, scheme.freqs is not None)
        self.factor = factor if isinstance(factor, tuple) else (factor,) * layout.axes
        if len(self.factor) != layout.axes or min(self.factor) <= 0:
            raise ValueError(f"factor is a positive number, or one for each of {layout.axes} axes, got {factor}")
        self.layout, self.rule, self.dynamic = layout, rule, dynamic
        self.scale = (temperature * sum(map(math.log, self.factor)) / layout.axes + 1) ** 2
        self.reach = reach

    def factors(self, grid: Sequence[int] | None) -> Sequence[Any]:
        """The factor of each axis for coordinates on a grid."""
        if not self.dynamic:
            return self.factor
        growth = [1.0] * self.layout.axes if grid is None else places.growth(self.layout.grid, grid, self.layout.unit)
        return [1 + factor * (torch.sym_max(s, 1.0) - 1) for factor, s in zip(self.factor, growth, strict=True)]

    def frequencies(self, coords: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        return self.rule(super().frequencies(coords, grid), self.factors(grid), self.reach)

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        return super().encode(coords, key_coords, grid)._replace(scale=self.scale)


@register
def interpolate(layout: Layout, scheme: Position, factor: Factor = 2.0) -> Position:
    """All frequencies are divided by the factor, as if the larger grid were squeezed into the other (arXiv:2306.15595).

    Raises ValueError, as all modifiers do, for a factor that is not positive or of another number of axes, and where no
    part of the scheme is rotary along the axes of the grid.
    """
    return _modify(layout, scheme, "interpolate", interpolated, factor)


@register
def ntk(layout: Layout, scheme: Position, factor: Factor = 2.0) -> Position:
    """The base grows, such that the fastest pair of each axis stays and the slowest is divided by the factor.

    "NTK-aware" scaling: base * s^(P / (P - 1)) for P pairs on an axis. Pairs that turn along several axes are ranked by
    the logarithm of their speed, which is the same for geometric frequencies.
    """
    return _modify(layout, scheme, "ntk", ntk_aware, factor)


@register
def dynamic(layout: Layout, scheme: Position, factor: Factor = 1.0) -> Position:
    """`ntk` by what the grid at hand says: factor * s - (factor - 1) where it reaches s times as far as in training.

    No farther, or without a grid, nothing changes: a model can be trained with it.
    """
    return _modify(layout, scheme, "dynamic", ntk_aware, factor, dynamic=True)


@register
def yarn(
    layout: Layout,
    scheme: Position,
    factor: Factor = 2.0,
    slow: float = 0.5,
    fast: float = 2.0,
    temperature: float = 0.1,
) -> Position:
    """Pairs that made `fast` turns over the training grid stay, those below `slow` are interpolated (arXiv:2309.00071).

    Between them the share grows with the number of turns, counted from one corner of the grid to the other. Half a turn
    shows all phases to attention that looks both ways; the paper's 1 and 32 are for texts. Logits are multiplied by
    (temperature * ln s + 1)². Raises ValueError also unless 0 <= slow < fast and temperature >= 0.
    """
    if not 0 <= slow < fast or temperature < 0:
        raise ValueError(f"yarn wants 0 <= slow < fast and temperature >= 0, got {slow}, {fast} and {temperature}")
    rule = partial(by_parts, slow=slow, fast=fast)
    return _modify(layout, scheme, "yarn", rule, factor, temperature=temperature)


# ---- rules ----------------------------------------------------------------------------------------------------------
def interpolated(freqs: Tensor, factors: Sequence[Any], reach: Sequence[float]) -> Tensor:
    """Frequencies (L, H, A, R) divided by the factor of each axis."""
    return torch.stack([freqs[..., a, :] / factor for a, factor in enumerate(factors)], dim=-2)


def ntk_aware(freqs: Tensor, factors: Sequence[Any], reach: Sequence[float]) -> Tensor:
    """Frequencies divided by factor^r, r the rank of a pair among those of the axis: 0 for the fastest, 1 slowest."""
    rank = ranks(freqs.detach())
    return torch.stack([freqs[..., a, :] * factor ** -rank[..., a, :] for a, factor in enumerate(factors)], dim=-2)


def ranks(freqs: Tensor) -> Tensor:
    """Where the logarithm of a pair's speed lies between those of the fastest, 0, and the slowest, 1, of each axis."""
    speed = freqs.norm(dim=-2, keepdim=True).clamp(min=torch.finfo(freqs.dtype).tiny)
    rotates = freqs != 0
    fastest = torch.where(rotates, speed, speed.amin()).amax(dim=-1, keepdim=True)
    slowest = torch.where(rotates, speed, speed.amax()).amin(dim=-1, keepdim=True)
    spread = (fastest / slowest).log()
    lone = spread < 1e-6  # which is as slow as it is fast
    return torch.where(lone, 1.0, (fastest / speed).log() / torch.where(lone, 1.0, spread))


def by_parts(freqs: Tensor, factors: Sequence[Any], reach: Sequence[float], slow: float, fast: float) -> Tensor:
    """Frequencies of which pairs with few turns over the reach of the training grid are divided by the factors."""
    revolutions = sum(freqs.detach()[..., a, :].abs() * length for a, length in enumerate(reach)) / (2 * math.pi)
    kept = ((cast(Tensor, revolutions) - slow) / (fast - slow)).clamp(0, 1)[..., None, :]
    return freqs * kept + interpolated(freqs, factors, reach) * (1 - kept)


# ---- schemes --------------------------------------------------------------------------------------------------------
def _modify(layout: Layout, scheme: Position, name: str, rule: Rule, factor: Factor, **options: Any) -> Position:
    """The scheme with its rotary parts under a rule, the others as they are."""
    leaves: list[Position] = []

    def under(part: Position, cells: Tensor) -> Position:
        """The part, which sees two neighbouring cells at `cells` (2, A)."""
        if isinstance(part, Sum):
            return Sum(*(under(cast(Position, each), cells) for each in part.parts))
        if isinstance(part, Measured):
            if options.get("dynamic"):
                raise ValueError(f"{name} goes by how far a grid reaches, but {type(part).__name__.lower()} {ALIKE}")
            part.scheme = under(part.scheme, part.measure(cells, layout.grid))
            return part
        leaves.append(part)
        if not _along_axes(part):
            return part
        reach = [n * float(distance) for n, distance in zip(layout.grid, cells.diff(dim=0)[0], strict=True)]
        return Scaled(layout, part, reach, rule, factor, **options)

    ends = torch.tensor([[0.0], [1.0]], device="cpu").expand(2, layout.axes)
    pitch = 1 / layout.cell(ends).diff(dim=0)
    changed = under(scheme, torch.cat((torch.zeros_like(pitch), pitch)))
    if not any(map(_along_axes, leaves)):
        kinds = " + ".join(type(part).__name__ for part in leaves)
        raise ValueError(f"{name} modifies schemes that rotate along the axes, such as axial or mixed, not {kinds}")
    return changed


def _along_axes(scheme: Position) -> TypeGuard[Rotary]:
    """Whether a scheme is its frequencies alone, which no class of its own treats in another way, but for rounding."""
    cls = type(scheme)
    plain = issubclass(cls, Rotary) and (cls.encode, cls.frequencies) == (Rotary.encode, Rotary.frequencies)
    return plain or isinstance(scheme, Exact)
