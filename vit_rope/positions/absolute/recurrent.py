"""Absolute positions that evolve along each axis, in recurrent steps or in continuous time.

Each axis has its own recurrence, and the vectors of the axes are summed. A single flow through the
plane would have to give the same vector along rows first and along columns first, so its two
velocities would have to commute, which is the condition of RoPE again.

Shapes   N tokens, A axes, C channels of a token
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..base import Layout
from ..grids import interpolate, sum_over_axes
from ..specs import register
from .base import Absolute


@register
class Recurrent(Absolute):
    """Vectors from a recurrent network along each axis: p_{k + 1} = tanh(W p_k + b).

    Interpolated linearly between cells. The network always runs for `extent` times the longest axis
    of the training grid, so that one compiled graph serves all grids. Cells beyond that have the
    vector of the last cell, and cells before 0 that of the first. Raises ValueError for an extent
    below 1.
    """

    unbounded = False

    def __init__(self, layout: Layout, extent: float = 2.0) -> None:
        super().__init__()
        if extent < 1:
            raise ValueError(f"recurrent needs an extent of at least 1, the full training grid, got {extent}")
        self.layout, self.cells = layout, math.ceil(extent * max(layout.grid))
        self.start = nn.Parameter(torch.empty(layout.axes, 1, layout.width))
        self.weight = nn.Parameter(torch.empty(layout.axes, layout.width, layout.width))
        self.bias = nn.Parameter(torch.empty(layout.axes, 1, layout.width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.start, std=0.5)
        nn.init.zeros_(self.bias)
        for weight in self.weight:
            nn.init.orthogonal_(weight)  # so that vectors neither vanish nor explode

    def vectors(self, coords: Tensor, grid: Sequence[int] | None, layer: int) -> Tensor:
        vectors = [self.start.to(coords.dtype)]  # (A, 1, C) each
        weight, bias = self.weight.to(coords.dtype), self.bias.to(coords.dtype)
        for _ in range(self.cells - 1):
            vectors.append(torch.tanh(torch.baddbmm(bias, vectors[-1], weight)))
        tables = torch.cat(vectors, dim=1)
        return sum_over_axes(
            lambda a, cells: interpolate(tables[a], cells[..., None]), self.layout.cell(coords, grid), grid
        )


@register
class Floater(Absolute):
    """Vectors p(t) = p(0) + ∫ h(s, p(s)) ds of a learned flow, added before every layer.

    FLOATER (arXiv:2003.09229) along each axis. h is an MLP with one hidden layer for each axis,
    shared by all layers. The integral runs from 0 to t, which is 1 at the end of the training grid.
    Each layer has its own p(0). The flow is integrated from cell 0 in `steps` steps of the
    classical Runge-Kutta method, whose error falls as steps^-4. It is defined at all coordinates:
    between cells, before the first and beyond the last. Raises ValueError for fewer than 1 step or
    hidden channel.
    """

    each_layer = True

    def __init__(self, layout: Layout, hidden: int = 64, steps: int = 8) -> None:
        super().__init__()
        if hidden < 1 or steps < 1:
            raise ValueError(f"floater needs at least 1 step and 1 hidden channel, got {steps} and {hidden}")
        self.layout, self.steps, axes, width = layout, steps, layout.axes, layout.width
        self.start = nn.Parameter(torch.empty(layout.depth, axes, width))
        self.inner = nn.Parameter(torch.empty(axes, width + 1, hidden))
        self.inner_bias = nn.Parameter(torch.empty(axes, hidden))
        self.outer = nn.Parameter(torch.empty(axes, hidden, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.start, std=0.02)
        nn.init.normal_(self.inner, std=self.start.shape[-1] ** -0.5)  # smooth enough for few steps
        with torch.no_grad():
            self.inner[:, 0].normal_(std=3.0)  # velocities change along the grid, each channel at a different time
        nn.init.normal_(self.inner_bias)
        nn.init.normal_(self.outer, std=self.outer.shape[1] ** -0.5)

    def vectors(self, coords: Tensor, grid: Sequence[int] | None, layer: int) -> Tensor:
        start = self.start.to(coords.dtype)[layer]

        def vectors_along(axis: int, cells: Tensor) -> Tensor:
            time = cells[..., None] / self.layout.grid[axis]
            return runge_kutta(lambda t, p: self.velocity(axis, t, p), start[axis], time, self.steps)

        return sum_over_axes(vectors_along, self.layout.cell(coords, grid), grid)

    def velocity(self, axis: int, time: Tensor, vector: Tensor) -> Tensor:
        """Return h (…, C) at times (…, 1) and vectors (…, C) along an axis."""
        inner, bias, outer = (w[axis].to(vector.dtype) for w in (self.inner, self.inner_bias, self.outer))
        return torch.tanh(torch.cat((time, vector), dim=-1) @ inner + bias) @ outer


def runge_kutta(velocity: Callable[[Tensor, Tensor], Tensor], start: Tensor, time: Tensor, steps: int) -> Tensor:
    """Integrate `velocity(time, vector)` from `start` (C) at 0 to times (…, 1), in equal steps."""
    vector, step = start.expand(*time.shape[:-1], -1), time / steps
    for i in range(steps):
        now = i * step
        k1 = velocity(now, vector)
        k2 = velocity(now + step / 2, vector + step / 2 * k1)
        k3 = velocity(now + step / 2, vector + step / 2 * k2)
        k4 = velocity(now + step, vector + step * k3)
        vector = vector + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return vector
