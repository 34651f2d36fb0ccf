"""Schemes that compute as their sources do, where the bits of a table, or more than the bits,
depend on how.

In exact arithmetic `dinov3` and `axial64` are `axial`; V-JEPA 2's transform is not a rotation.

Shapes   B samples, N tokens, A axes, R channel pairs, D channels of a head
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base import Layout, Position
from ..encoding import Encoding
from ..specs import register
from ..transform import Transform, rotation_of
from .axial import axial
from .base import Pairs, Rotary, geometric


class Exact(Rotary):
    """A rotary scheme that computes its angles as its source does, from constants (A, R) for axes
    and pairs.

    Changes that only reorder axes and pairs reorder the constants; any other change replaces the
    source's arithmetic by that of `Rotary`.
    """

    def __init__(self, freqs: Tensor, constants: Tensor, pairs: Pairs = "interleaved") -> None:
        super().__init__(freqs[None, None], pairs)
        self.constants = constants

    def angle(self, coords: Tensor, constants: Tensor) -> Tensor:
        """Angles (…, A, R) of coordinates (…, A, 1), which are then summed over the axes."""
        raise NotImplementedError(f"{type(self).__name__} needs angle()")

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        if not all(change.permutes for change in self.changes):
            return super().encode(coords, key_coords, grid)
        k = None if key_coords is None else self.rotation_at(key_coords)
        return Encoding(self.rotation_at(coords), k, stride=self.stride)

    def rotation_at(self, coords: Tensor) -> Transform:
        """The rotation of queries or keys at coordinates (N, A) or (B, N, A)."""
        coords = coords if coords.ndim == 3 else coords[None]
        constants = self.constants.to(coords.device)
        for change in self.changes:
            constants = change(constants, None)
        theta = self.angle(coords[..., None], constants).sum(dim=-2)[:, :, None]
        return Transform(rotation=[torch.stack((theta.cos(), theta.sin()), dim=-1).to(coords.dtype)])


@register
class DinoV3(Exact):
    """DINOv3's axial RoPE (arXiv:2508.10104): coordinate c, centered in [-1, 1], rotates by 2 pi c
    / period.

    The periods of an axis are base^(j/P), j = 0 … P - 1. The files that Meta publishes hold them
    rounded to "bfloat16"; timm and transformers compute them in "float32". Raises ValueError where
    the head's channels do not divide equally between the axes.
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
        constants = torch.full((layout.axes, layout.axes, count), math.inf, device="cpu")
        constants[range(layout.axes), range(layout.axes)] = series
        constants = constants.flatten(1)
        super().__init__(2 * math.pi / constants, constants, pairs)
        self.periods = periods

    def angle(self, coords: Tensor, constants: Tensor) -> Tensor:
        return 2 * math.pi * coords / constants


@register
class Axial64(Exact):
    """`axial` whose frequencies and angles are float64 until their cosine is computed, as in Flux
    and Wan.

    Compiled and exported graphs stay in the precision of the coordinates, because not every device
    has float64.
    """

    def __init__(
        self, layout: Layout, base: float = 10000.0, share: Literal["equal", "rest"] | tuple[int, ...] = "equal"
    ) -> None:
        freqs = axial(layout, base, share).initial[0, 0]
        constants = torch.zeros_like(freqs, dtype=torch.float64)
        for axis, row in enumerate(freqs):
            pairs = row.nonzero()[:, 0]
            series = torch.arange(len(pairs), dtype=torch.float64, device="cpu") / len(pairs)
            constants[axis, pairs] = 1.0 / base**series
        super().__init__(freqs, constants)

    def angle(self, coords: Tensor, constants: Tensor) -> Tensor:
        return coords.double() * constants

    def rotation_at(self, coords: Tensor) -> Transform:
        if torch.compiler.is_compiling():
            return rotation_of(self.frequencies(coords), coords)
        return super().rotation_at(coords)


@register
class VJepa2(Position):
    """V-JEPA 2's transform (arXiv:2506.09985) instead of a rotation: the channels of a pair use
    different angles.

    Each axis has an equal, even share of channels; the others stay as they are. In a share of D
    channels, channel i uses the angle coordinate * base^(-2 (i mod D/2) / D) together with its
    neighbour. Scores depend on more than displacements: it serves weights that were trained with
    it. Raises ValueError for a base that is not positive or heads without a pair of channels for
    each axis.
    """

    relative, reversible, unbounded = False, True, True

    def __init__(self, layout: Layout, base: float = 10000.0) -> None:
        super().__init__()
        width = 2 * (layout.head_dim // layout.axes // 2)
        if width == 0 or base <= 0:
            raise ValueError(f"vjepa2 needs a base above 0 and heads of {2 * layout.axes} channels or more")
        omega = geometric(width // 2, base).float().repeat(2)
        speeds = torch.zeros(layout.axes, layout.axes, width, device="cpu")
        speeds[range(layout.axes), range(layout.axes)] = omega
        self.speeds = F.pad(speeds.flatten(1), (0, layout.head_dim - layout.axes * width))

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        k = None if key_coords is None else self.matrices(key_coords)
        return Encoding(self.matrices(coords), k)

    def matrices(self, coords: Tensor) -> Transform:
        """Matrices (B, N, 1, D, D) in the place of rotations."""
        coords = coords if coords.ndim == 3 else coords[None]
        theta = (coords[..., None] * self.speeds.to(coords)).sum(dim=-2)
        channels = theta.shape[-1]
        partner = theta.new_zeros(channels, channels)
        even = torch.arange(0, channels - 1, 2, device=theta.device)
        partner[even, even + 1], partner[even + 1, even] = 1.0, -1.0
        matrix = torch.diag_embed(theta.cos()) + partner * theta.sin()[..., None, :]
        return Transform(basis=[matrix[:, :, None]])
