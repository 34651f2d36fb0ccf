"""Positions from a convolution over the map of tokens: what a token's neighbours are, and where the map ends."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base import Layout, Position
from ..grids import is_whole
from ..specs import register
from .wrappers import Inject

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Convolution(Position):
    """x + a depthwise convolution of x, over the map of all tokens. `peg` says when, and what the options are."""

    unbounded = False  # cells beyond the border count as those at it, and those far from any border look the same

    def __init__(self, layout: Layout, kernel: int, padding: Literal["zeros", "circular"]) -> None:
        super().__init__()
        self.layout, self.padding, self.relative = layout, padding, padding == "circular"
        self.weight = nn.Parameter(torch.empty(layout.width, 1, *(kernel,) * layout.axes))
        self.bias = nn.Parameter(torch.empty(layout.width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        taps = self.weight[0].numel()
        nn.init.uniform_(self.weight, -(taps**-0.5), taps**-0.5)
        nn.init.uniform_(self.bias, -(taps**-0.5), taps**-0.5)

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        sizes = self.layout.grid if grid is None else grid
        if grid is not None and is_whole(coords, grid):
            return x + self.convolve(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        number = self.cells(coords, sizes).expand(len(x), -1)[..., None].expand_as(x)
        maps = x.new_zeros(len(x), torch.Size(sizes).numel(), x.shape[2])
        maps = maps.scatter_reduce(1, number, x, "mean", include_self=False)
        found = self.convolve(maps.transpose(1, 2).unflatten(2, sizes)).flatten(2).transpose(1, 2)
        return x + found.gather(1, number)

    def cells(self, coords: Tensor, sizes: Sequence[int]) -> Tensor:
        """Row-major numbers (B or 1, N) of the cells of a map that coordinates fall into."""
        nearest = (self.layout.cell(coords, sizes) + 0.5).floor().long()
        total = torch.zeros_like(nearest[..., 0])
        for a, n in enumerate(sizes):
            at = nearest[..., a] % n if self.padding == "circular" else nearest[..., a].clamp(0, n - 1)
            total = total * n + at
        return total if total.ndim == 2 else total[None]

    def convolve(self, maps: Tensor) -> Tensor:
        """Maps (B, C, *sizes) to maps of the same size, a kernel for each channel."""
        kernel = self.weight.shape[2:]
        weight, bias = self.weight.to(maps.dtype), self.bias.to(maps.dtype)
        border = [n // 2 for n in kernel for _ in range(2)]
        maps = F.pad(maps, border, mode="circular") if self.padding == "circular" else F.pad(maps, border)
        return CONVOLUTIONS[len(kernel)](maps, weight, bias, groups=len(weight)).to(maps.dtype)


@register
def peg(layout: Layout, kernel: int = 3, padding: Literal["zeros", "circular"] = "zeros") -> Inject:
    """x + a depthwise convolution over the map of tokens, after the first layer: PEG, of CPVT (arXiv:2102.10882).

    Nothing says where a token is but its neighbours and the zeros beyond the border; with `padding` "circular" there is
    no border, and nothing leaks. Acts before layer 1, or layer 0 of one. Dropped tokens are zeros in the map; tokens at
    coordinates of the caller's own go to the cell that each falls into, of the training grid, or to its border from
    beyond (round it, where circular), and count by their mean where they share one. The map needs 1, 2 or 3 axes:
    ValueError for others, for an even kernel, and for one that is circular and wider than the grid.
    """
    if layout.axes not in CONVOLUTIONS:
        raise ValueError(f"peg convolves maps of 1, 2 or 3 axes, got {layout.axes}")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"peg needs a kernel of an odd size, which has a middle, got {kernel}")
    if padding == "circular" and kernel // 2 > min(layout.grid):
        raise ValueError(f"a circular kernel of {kernel} winds around a grid of {layout.grid} more than once")
    return Inject(layout, Convolution(layout, kernel, padding), layers=(min(1, layout.depth - 1),))
