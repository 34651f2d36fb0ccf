"""Baselines and negative controls: schemes that lack a property on purpose, as their claims say.

Shapes   L layers, B samples, N tokens, H heads, S blocks of b channels, A axes
"""

import functools
import math
from typing import Literal

import torch
from torch import Tensor, nn

from ..ops.tables import angles
from .base import Layout, Position
from .rotary.axial import axial
from .rotary.base import Pairs, Rotary, geometric
from .rotary.generators import Exponential, exponential
from .specs import register


@register
def none(layout: Layout) -> Position:
    """No positions: the baseline, for which tokens form a set."""
    return Position()


@register
def sumcoords(layout: Layout, base: float = 100.0, pairs: Pairs = "interleaved") -> Rotary:
    """RoPE at x + y: relative, but all cells with the same sum of coordinates look the same.

    The control in Su's derivation (https://kexue.fm/archives/8397) that is not reversible on more
    than one axis. Raises ValueError for an odd head dimension.
    """
    one = axial(Layout(layout.heads * layout.head_dim, layout.heads, (1,)), base, pairs=pairs).initial
    return Rotary(one.expand(-1, -1, layout.axes, -1), pairs)


@register
class Quaternion(Exponential):
    """Groups of four channels are quaternions, multiplied by exp((x i + y j) theta); i and j do not
    commute.

    The control in Su's derivation (https://kexue.fm/archives/8397) that is not relative on more
    than one axis, although every matrix is orthogonal. The F groups of a head have frequencies
    base^(-f/F); a third axis uses k. Raises ValueError for more than three axes or a head dimension
    that does not divide by 4.
    """

    def __init__(self, layout: Layout, base: float = 100.0) -> None:
        super().__init__(layout)
        if layout.axes > 3 or layout.head_dim % 4:
            raise ValueError(
                f"quaternion has units for up to 3 axes and groups of four channels, "
                f"got {layout.axes} axes and head_dim {layout.head_dim}"
            )
        if base <= 0:
            raise ValueError(f"quaternion needs a positive base, got {base}")
        self.relative = layout.axes == 1
        product = torch.zeros(3, 4, 4, dtype=torch.float64, device="cpu")  # of 1, i, j, k by i, j and k from the right
        for unit in range(3):
            one, two = 1 + (unit + 1) % 3, 1 + (unit + 2) % 3  # (j, k), (k, i), (i, j): one · two = unit, cyclically
            product[unit, 1 + unit, 0] = product[unit, one, two] = 1.0
        product = product - product.mT
        speeds = geometric(layout.head_dim // 4, base)[:, None, None]
        self.initial = (product[: layout.axes, None] * speeds)[None, None].float()

    def generators(self, coords: Tensor) -> Tensor:
        return self.initial


@register
class Spherical(Exponential):
    """Groups of three channels are vectors, rotated about one axis of space by the row and about
    another by the column.

    Rotations of a sphere do not commute, so this is not relative on more than one axis
    (arXiv:2511.08368). The F groups of a head have frequencies base^(-f/F); channels that do not
    divide are not rotated. Raises ValueError for more than three axes or a head dimension below 3.
    """

    def __init__(self, layout: Layout, base: float = 100.0) -> None:
        super().__init__(layout)
        count = -(-layout.head_dim // 3)
        if layout.axes > 3 or layout.head_dim < 3:
            raise ValueError(
                f"spherical rotates about up to 3 axes of space, in groups of three channels, "
                f"got {layout.axes} axes and head_dim {layout.head_dim}"
            )
        if base <= 0:
            raise ValueError(f"spherical needs a positive base, got {base}")
        self.relative = layout.axes == 1
        cross = torch.zeros(3, 1, 3, 3, device="cpu")  # cross products with the axes of space
        cross[[0, 1, 2], 0, [2, 0, 1], [1, 2, 0]] = 1.0
        speeds = geometric(layout.head_dim // 3, base).float()
        speeds = nn.functional.pad(speeds, (0, count - len(speeds)))
        self.initial = (cross - cross.mT)[: layout.axes] * speeds[:, None, None]

    def rotations(self, coords: Tensor) -> Tensor:
        each = (exponential(self.initial[None, None, [a]], coords[..., [a]]) for a in range(coords.shape[-1]))
        return functools.reduce(torch.matmul, each)


@register
class Orthogonal(Exponential):
    """Powers O_1^y O_2^x of commuting orthogonal matrices: RoPE in another basis, or undefined
    between cells.

    With determinant=1 every O is an exponential, and this is axial RoPE. With -1 (a control) one
    channel changes sign from cell to cell. That is relative on whole numbers, but O has no real
    logarithm: between cells the real part of the power is not a rotation, and logits depend on more
    than displacements (https://kexue.fm/archives/8397). Raises ValueError as `axial` does.
    """

    def __init__(self, layout: Layout, base: float = 100.0, determinant: Literal[-1, 1] = -1) -> None:
        super().__init__(layout)
        freqs = axial(layout, base, "rest").initial
        self.initial = nn.functional.pad(freqs, (0, layout.head_dim // 2 - freqs.shape[-1]))
        self.relative, self.reflects = determinant == 1, determinant == -1

    def rotations(self, coords: Tensor) -> Tensor:
        theta = angles(self.initial.to(coords.device, coords.dtype), coords)
        rotation = torch.stack((theta.cos(), -theta.sin(), theta.sin(), theta.cos()), dim=-1).unflatten(-1, (2, 2))
        if not self.reflects:
            return rotation
        sign = (math.pi * coords.sum(dim=-1)).cos().reshape(1, -1, coords.shape[-2], 1, 1)  # real part of (-1)^(y + x)
        mirror = torch.stack((torch.ones_like(sign), torch.zeros_like(sign), torch.zeros_like(sign), sign), dim=-1)
        return torch.cat((rotation[..., :-1, :, :], mirror.unflatten(-1, (2, 2))), dim=-3)
