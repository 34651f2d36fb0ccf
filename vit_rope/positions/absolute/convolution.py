"""Positions from a convolution over the map of tokens, whose zero padding reveals the border.

Shapes   B samples, N tokens, A axes, C channels of a token; maps (B, C, *sizes)
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base import Layout, Position
from ..grids import is_full_grid
from ..specs import register
from .wrappers import Inject

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Convolution(Position):
    """x + a depthwise convolution of x over the map of all tokens; see `peg` for the options."""

    relative = False  # also if circular: tokens between cells go to the nearest one, so only whole steps change nothing

    def __init__(self, layout: Layout, kernel: int, padding: Literal["zeros", "circular"]) -> None:
        super().__init__()
        self.layout, self.padding = layout, padding
        self.weight = nn.Parameter(torch.empty(layout.width, 1, *(kernel,) * layout.axes))
        self.bias = nn.Parameter(torch.empty(layout.width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        taps = self.weight[0].numel()
        nn.init.uniform_(self.weight, -(taps**-0.5), taps**-0.5)
        nn.init.uniform_(self.bias, -(taps**-0.5), taps**-0.5)

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        sizes = self.layout.grid if grid is None else grid
        if grid is not None and is_full_grid(coords, grid):
            return x + self.convolve(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        index = self.cells(coords, sizes).expand(len(x), -1)[..., None].expand_as(x)
        maps = x.new_zeros(len(x), torch.Size(sizes).numel(), x.shape[2])
        maps = maps.scatter_reduce(1, index, x, "mean", include_self=False)
        convolved = self.convolve(maps.transpose(1, 2).unflatten(2, sizes)).flatten(2).transpose(1, 2)
        return x + convolved.gather(1, index)

    def cells(self, coords: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return row-major indices (B or 1, N) of the cells of a map at these coordinates."""
        nearest = (self.layout.cell(coords, sizes) + 0.5).floor().long()
        index = torch.zeros_like(nearest[..., 0])
        for a, n in enumerate(sizes):
            along_axis = nearest[..., a] % n if self.padding == "circular" else nearest[..., a].clamp(0, n - 1)
            index = index * n + along_axis
        return index if index.ndim == 2 else index[None]

    def convolve(self, maps: Tensor) -> Tensor:
        """Convolve maps (B, C, *sizes) to maps of the same size, with a kernel for each channel."""
        kernel = self.weight.shape[2:]
        weight, bias = self.weight.to(maps.dtype), self.bias.to(maps.dtype)
        border = [n // 2 for n in kernel for _ in range(2)]
        maps = F.pad(maps, border, mode="circular") if self.padding == "circular" else F.pad(maps, border)
        return CONVOLUTIONS[len(kernel)](maps, weight, bias, groups=len(weight)).to(maps.dtype)


@register
def peg(layout: Layout, kernel: int = 3, padding: Literal["zeros", "circular"] = "zeros") -> Inject:
    """x + a depthwise convolution over the map of tokens: PEG of CPVT (arXiv:2102.10882).

    A token's location shows only in its neighbors and in the zeros beyond the border. With
    `padding` "circular" there is no border, so no position leaks: a shift by whole cells changes
    nothing. The convolution acts before layer 1, or before layer 0 of a model with one layer.

    Dropped tokens are zeros in the map. Tokens with custom coordinates go to the cell of the
    training grid that contains them. Tokens beyond the grid go to its border, or wrap around if
    circular. Tokens in the same cell are averaged.

    Raises ValueError for more than 3 axes, an even kernel, or a circular kernel wider than the
    grid.
    """
    if layout.axes not in CONVOLUTIONS:
        raise ValueError(f"peg convolves maps of 1, 2 or 3 axes, got {layout.axes}")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"peg needs a kernel of an odd size, which has a center, got {kernel}")
    if padding == "circular" and kernel // 2 > min(layout.grid):
        raise ValueError(f"a circular kernel of {kernel} wraps around a grid of {layout.grid} more than once")
    return Inject(layout, Convolution(layout, kernel, padding), layers=(min(1, layout.depth - 1),))
