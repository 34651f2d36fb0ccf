"""Schemes that compute as their sources do, where the bits of a table, or more than those, depend on how.

In exact numbers `dinov3` and `axial64` are `axial`; V-JEPA 2's transform is no rotation at all.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..base import Layout, Position
from ..encoding import Encoding, Transform
from ..specs import register
from .axial import axial
from .base import Pairs, Rotary, geometric, rotation_of


class Exact(Rotary):
    """A rotary scheme that computes its angles as its source does, from numbers `exact` (A, R) for axes and pairs."""

    def __init__(self, freqs: Tensor, exact: Tensor, pairs: Pairs = "interleaved") -> None:
        super().__init__(freqs[None, None], pairs)
        self.exact = exact

    def angle(self, coords: Tensor, exact: Tensor) -> Tensor:
        """Angles (…, A, R) of coordinates (…, A, 1), of which the sum over the axes counts."""
        raise NotImplementedError(f"{type(self).__name__} needs angle()")

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        k = None if key_coords is None else self.side(key_coords)
        return Encoding(self.side(coords), k, stride=self.stride)

    def side(self, coords: Tensor) -> Transform:
        """Queries or keys at coordinates (N, A) or (B, N, A)."""
        places = coords if coords.ndim == 3 else coords[None]
        theta = self.angle(places[..., None], self.exact.to(coords.device)).sum(dim=-2)[:, :, None]
        return Transform(turn=[torch.stack((theta.cos(), theta.sin()), dim=-1).to(coords.dtype)])


@register
class DinoV3(Exact):
    """DINOv3's axial RoPE (arXiv:2508.10104): coordinate c, centered in [-1, 1], turns by 2 pi c / period.

    The periods of an axis are base^(j/P), j = 0 … P - 1. The files that Meta publishes carry them rounded to
    "bfloat16"; timm and transformers compute them in "float32". Raises ValueError where axes have no equal share.
    """

    def __init__(
        self,
        layout: Layout,
        base: float = 100.0,
        pairs: Pairs = "half",
        periods: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        count = axial(layout, base).initial.shape[-1] // layout.axes
        series = base ** (torch.arange(count, dtype=torch.float32, device="cpu") / count)
        if periods == "bfloat16":
            series = series.bfloat16().float()
        exact = torch.full((layout.axes, layout.axes, count), math.inf, device="cpu")
        exact[range(layout.axes), range(layout.axes)] = series
        exact = exact.flatten(1)
        super().__init__(2 * math.pi / exact, exact, pairs)
        self.periods = periods

    def angle(self, coords: Tensor, exact: Tensor) -> Tensor:
        return 2 * math.pi * coords / exact


@register
class Axial64(Exact):
    """`axial` whose frequencies and angles are float64 until their cosine is taken, as Flux and Wan compute them.

    Compiled and exported graphs stay in the coordinates' own precision, for not every device has float64.
    """

    def __init__(
        self, layout: Layout, base: float = 10000.0, share: Literal["equal", "rest"] | tuple[int, ...] = "equal"
    ) -> None:
        freqs = axial(layout, base, share).initial[0, 0]
        exact = torch.zeros_like(freqs, dtype=torch.float64)
        for axis, row in enumerate(freqs):
            at = row.nonzero()[:, 0]
            exact[axis, at] = 1.0 / base ** (torch.arange(len(at), dtype=torch.float64, device="cpu") / len(at))
        super().__init__(freqs, exact)

    def angle(self, coords: Tensor, exact: Tensor) -> Tensor:
        return coords.double() * exact

    def side(self, coords: Tensor) -> Transform:
        return rotation_of(self.frequencies(coords), coords) if torch.compiler.is_compiling() else super().side(coords)


@register
class VJepa2(Position):
    """What V-JEPA 2 (arXiv:2506.09985) does in place of a rotation: the two channels of a pair turn by other angles.

    Each axis has an equal, even share of channels, the rest stays as it is; of a share of D channels, channel i turns
    by coordinate * base^(-2 (i mod D/2) / D), beside its neighbour. Scores depend on more than displacements: it serves
    weights that were trained so.
    """

    relative, reversible = False, True

    def __init__(self, layout: Layout, base: float = 10000.0) -> None:
        super().__init__()
        width = 2 * (layout.head_dim // layout.axes // 2)
        if width == 0 or base <= 0:
            raise ValueError(f"vjepa2 needs a base above 0 and heads of {2 * layout.axes} channels or more")
        omega = geometric(width // 2, base).float().repeat(2)
        speeds = torch.zeros(layout.axes, layout.axes, width, device="cpu")
        speeds[range(layout.axes), range(layout.axes)] = omega
        self.speeds = torch.nn.functional.pad(speeds.flatten(1), (0, layout.head_dim - layout.axes * width))

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        k = None if key_coords is None else self.side(key_coords)
        return Encoding(self.side(coords), k)

    def side(self, coords: Tensor) -> Transform:
        """Matrices (B, N, 1, D, D) that stand for the rotations."""
        coords = coords if coords.ndim == 3 else coords[None]
        theta = (coords[..., None] * self.speeds.to(coords)).sum(dim=-2)
        channels = theta.shape[-1]
        across = theta.new_zeros(channels, channels)
        even = torch.arange(0, channels - 1, 2, device=theta.device)
        across[even, even + 1], across[even + 1, even] = 1.0, -1.0
        matrix = torch.diag_embed(theta.cos()) + across * theta.sin()[..., None, :]
        return Transform(basis=[matrix[:, :, None]])
