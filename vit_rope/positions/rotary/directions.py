"""Variants of axial and mixed: other ways to give each channel pair a direction and a speed,
nothing learned.

Shapes   H heads, A axes, R channel pairs; directions (A, R) or (H, A, R)
"""

import math

import torch
from torch import Tensor

from ..base import Layout
from ..specs import register
from .base import Pairs, Rotary, geometric


@register
def splitaxial(layout: Layout, base: float = 10000.0, pairs: Pairs = "interleaved", fastest: float = 1.0) -> Rotary:
    """The axes share one spectrum alternately: of two axes, rows get the even frequencies, columns
    the odd ones.

    Pair j of P rotates along axis j mod A at `fastest` * base^(-j/P), in radians per unit, so that
    no two pairs have the same speed (Pixtral, arXiv:2410.07073; interleaved M-RoPE,
    arXiv:2511.21631). Raises ValueError for an odd head dimension or one that is too small.
    """
    count = _pairs("splitaxial", layout, base, fastest)
    axis = torch.arange(count, device="cpu") % layout.axes
    return _rotary(torch.nn.functional.one_hot(axis, layout.axes).t().double(), base, pairs, fastest)


@register
def goldengate(
    layout: Layout, base: float = 100.0, pairs: Pairs = "interleaved", fastest: float = 1.0, rounds: int = 64
) -> Rotary:
    """Directions spread evenly over the sphere by a golden-ratio sequence, different for each head,
    not learned.

    Pair j of P rotates at `fastest` * base^(-j/P), in radians per unit. Its direction is a point of
    the sequence i (1/g, 1/g^2, …) mod 1, where g^(A + 1) = g + 1, mapped through the inverse normal
    distribution and normalised to length 1 (J. Xiong, "On N-dimensional rotary positional
    embeddings", 2025). The published code computes g in 10 `rounds`, to 1e-7, which shows in the
    fourth digit of the last directions. Raises ValueError for an odd head dimension, one that is
    too small, or no rounds.
    """
    count = _pairs("goldengate", layout, base, fastest)
    if rounds < 1:
        raise ValueError(f"goldengate needs 1 round or more to compute its ratio, got {rounds}")
    golden = 2.0
    for _ in range(rounds):
        golden = (1 + golden) ** (1 / (layout.axes + 1))
    steps = golden ** -torch.arange(1, layout.axes + 1, dtype=torch.float64, device="cpu")
    number = torch.arange(1, layout.heads * count + 1, dtype=torch.float64, device="cpu")
    normal = torch.erfinv(2 * (number[:, None] * steps % 1) - 1)
    directions = torch.nn.functional.normalize(normal, dim=-1).view(layout.heads, count, -1).mT
    return _rotary(directions, base, pairs, fastest)


@register
def simplex(layout: Layout, base: float = 100.0, pairs: Pairs = "interleaved", fastest: float = 1.0) -> Rotary:
    """Each frequency is a lattice of waves towards the A + 1 corners of a regular simplex: on
    images, 120° apart.

    Pair j rotates along corner j mod (A + 1) at `fastest` * base^(-i/F) in radians per unit, i = j
    // (A + 1), with F frequencies in total; the last has fewer waves where A + 1 does not divide
    the pairs (nD-RoPE, arXiv:2606.12146). Raises ValueError for an odd head dimension or one that
    is too small.
    """
    count, corners = _pairs("simplex", layout, base, fastest), layout.axes + 1
    number = torch.arange(count, device="cpu")
    speeds = geometric(math.ceil(count / corners), base)[number // corners]
    return Rotary((fastest * regular_simplex(layout.axes)[:, number % corners] * speeds)[None, None], pairs)


def regular_simplex(axes: int) -> Tensor:
    """Unit vectors (A, A + 1) in float64 to the corners of a regular simplex: any two have the
    product -1 / A.
    """
    corners = torch.zeros(axes, axes + 1, dtype=torch.float64, device="cpu")
    for a in range(axes):  # the first coordinates of a corner are those of all later ones
        corners[a, a] = math.sqrt(1 - corners[:a, a].square().sum())
        corners[a, a + 1 :] = (-1 / axes - corners[:a, a] @ corners[:a, a + 1 :]) / corners[a, a]
    return corners


def _pairs(name: str, layout: Layout, base: float, fastest: float) -> int:
    """How many channel pairs a head has, after checking that a scheme can give each axis one."""
    head = layout.head_dim
    if head % 2 or head < 2 * layout.axes:
        even = max(2 * layout.axes, head + head % 2)
        raise ValueError(
            f"{name} rotates pairs of channels on {layout.axes} axes, so head_dim must be even and at least "
            f"{2 * layout.axes}, got {head}; use {even}"
        )
    if base <= 0 or fastest <= 0:
        raise ValueError(f"{name} needs a positive base and fastest, got base {base} and fastest {fastest}")
    return head // 2


def _rotary(directions: Tensor, base: float, pairs: Pairs, fastest: float) -> Rotary:
    """A Rotary along directions (A, R) or (H, A, R) with speeds that fall geometrically from pair
    to pair.
    """
    freqs = fastest * directions * geometric(directions.shape[-1], base)
    return Rotary(freqs.view(1, -1, *freqs.shape[-2:]), pairs)
