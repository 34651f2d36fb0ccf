"""ComRoPE (arXiv:2506.03737): generators in commuting blocks, which in a suitable basis are
frequencies.

Shapes   L layers and H heads, A axes, S blocks of b channels each
"""

import functools

import torch
from torch import Tensor, nn

from ..base import Layout
from ..specs import register
from .axial import LearnedSpeeds
from .base import Rotary
from .generators import blocks_of


@register
def comrope_ap(layout: Layout, block: int = 8, std: float = 0.1) -> Rotary:
    """ComRoPE with partitioned angles: blocks of channels belong to the axes alternately, each with
    a learned generator.

    A generator P - P^T of b channels is b / 2 frequencies in a basis that the projections absorb.
    Those frequencies are learned, for each layer and head, and are initialised as those of a normal
    P with standard deviation `std`, in radians per unit (ComRoPE-AP, arXiv:2506.03737). Raises
    ValueError for an odd block or where an axis gets no block.
    """
    draw = functools.partial(_partitioned_speeds, layout, block, std)
    speeds = draw()
    axis = torch.arange(layout.head_dim // block, device="cpu") % layout.axes
    directions = nn.functional.one_hot(axis, layout.axes).t().repeat_interleave(block // 2, dim=-1)
    return LearnedSpeeds(directions, speeds, draw_speeds=draw)


@register("comrope_ld")
class ComRoPELD(Rotary):
    """ComRoPE with linearly dependent generators: each block has one, times a learned number for
    each axis.

    B_a = theta_a (P - P^T) is theta_a times the b / 2 frequencies of P - P^T, in a basis that the
    projections absorb, so that each block has one direction theta. Both are learned, for each layer
    and head; theta is initialised from a normal distribution, frequencies as those of a normal P
    with standard deviation `std`, in radians per unit (ComRoPE-LD, arXiv:2506.03737). Raises
    ValueError for an odd block or where there are fewer blocks than axes.
    """

    def __init__(self, layout: Layout, block: int = 8, std: float = 0.1) -> None:
        draw = functools.partial(_random_factors, layout, block, std)
        theta, speeds = draw()
        super().__init__((theta * speeds[:, :, None]).flatten(-2))
        self.draw_factors, self.initial_factors = draw, (theta, speeds)
        self.theta, self.speeds = nn.Parameter(torch.empty(theta.shape)), nn.Parameter(torch.empty(speeds.shape))
        self._start()

    def reset_parameters(self) -> None:
        theta, speeds = self.initial_factors = self.draw_factors()
        self.initial = (theta * speeds[:, :, None]).flatten(-2)
        self._start()

    def base_frequencies(self, coords: Tensor) -> Tensor:
        return (self.theta.to(coords.dtype) * self.speeds.to(coords.dtype)[:, :, None]).flatten(-2)

    def _start(self) -> None:
        with torch.no_grad():
            for parameter, value in zip((self.theta, self.speeds), self.initial_factors, strict=True):
                parameter.copy_(value)


def _partitioned_speeds(layout: Layout, block: int, std: float) -> Tensor:
    """Frequencies (L, H, R) of `comrope_ap`."""
    return _random_speeds("comrope_ap", layout, block, std).flatten(-2)


def _random_factors(layout: Layout, block: int, std: float) -> tuple[Tensor, Tensor]:
    """Numbers theta (L, H, A, S, 1) and frequencies (L, H, S, b / 2) of `comrope_ld`."""
    speeds = _random_speeds("comrope_ld", layout, block, std)
    return torch.randn(layout.depth, layout.heads, layout.axes, speeds.shape[-2], 1, device="cpu"), speeds


def _random_speeds(name: str, layout: Layout, block: int, std: float) -> Tensor:
    """Frequencies (L, H, S, b / 2) of matrices P - P^T with normal P (b, b)."""
    count = blocks_of(name, layout, block)
    if block % 2 or count < layout.axes:
        raise ValueError(
            f"{name} needs an even block, and a block for each of {layout.axes} axes, got {count} blocks of {block} in "
            f"head_dim {layout.head_dim}"
        )
    if std <= 0:
        raise ValueError(f"{name} needs a positive standard deviation, got {std}")
    p = std * torch.randn(layout.depth, layout.heads, count, block, block, device="cpu")
    return torch.linalg.eigvalsh(1j * (p - p.mT))[..., block // 2 :].float()
