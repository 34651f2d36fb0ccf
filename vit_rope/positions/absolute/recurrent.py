"""Absolute positions that grow from one place to the next: by a recurrent step, or by a flow in continuous time.

Along several axes each has its own, and the vectors of a place are summed. A single flow through the plane would have
to reach a place by rows and by columns alike, so its two velocities would have to commute: the condition of RoPE again.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..base import Layout
from ..grids import read, summed
from ..specs import register
from .base import Absolute


@register
class Recurrent(Absolute):
    """Places a step of a recurrent network apart, p_{k + 1} = tanh(W p_k + b), for each axis its own.

    Linear between cells. The network runs over `reach` times the longest axis of the training grid and no further, so
    that one compiled graph serves all grids; what lies beyond, or before cell 0, is as the last cell, or the first.
    Raises ValueError for a reach below 1.
    """

    unbounded = False

    def __init__(self, layout: Layout, reach: float = 2.0) -> None:
        super().__init__()
        if reach < 1:
            raise ValueError(f"recurrent needs a reach of at least 1, all of the training grid, got {reach}")
        self.layout, self.cells = layout, math.ceil(reach * max(layout.grid))
        self.start = nn.Parameter(torch.empty(layout.axes, 1, layout.width))
        self.weight = nn.Parameter(torch.empty(layout.axes, layout.width, layout.width))
        self.bias = nn.Parameter(torch.empty(layout.axes, 1, layout.width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.start, std=0.5)
        nn.init.zeros_(self.bias)
        for weight in self.weight:
            nn.init.orthogonal_(weight)  # so that steps neither fade nor explode

    def vectors(self, coords: Tensor, grid: Sequence[int] | None, layer: int) -> Tensor:
        places = [self.start.to(coords.dtype)]  # (A, 1, C) each
        weight, bias = self.weight.to(coords.dtype), self.bias.to(coords.dtype)
        for _ in range(self.cells - 1):
            places.append(torch.tanh(torch.baddbmm(bias, places[-1], weight)))
        tables = torch.cat(places, dim=1)
        return summed(lambda a, at: read(tables[a], at[..., None]), self.layout.cell(coords, grid), grid)


@register
class Floater(Absolute):
    """Places along a learned flow, p(t) = p(0) + the integral of h(s, p(s)) from 0 to t, before every layer.

    FLOATER (arXiv:2003.09229), an axis at a time: h is a network of one hidden layer for each axis that all layers
    share, and each layer has its own p(0). t is 1 at the end of the training grid. A place is reached from cell 0 in
    `steps` steps of the classical Runge-Kutta method, whose error falls as steps^-4; any coordinate has a place,
    between cells, before the first and beyond the last. Raises ValueError for fewer than 1 step or hidden channel.
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
        nn.init.normal_(self.inner, std=self.start.shape[-1] ** -0.5)  # gentle enough for few steps
        with torch.no_grad():
            self.inner[:, 0].normal_(std=3.0)  # velocities that change over a grid, each at a time of its own
        nn.init.normal_(self.inner_bias)
        nn.init.normal_(self.outer, std=self.outer.shape[1] ** -0.5)

    def vectors(self, coords: Tensor, grid: Sequence[int] | None, layer: int) -> Tensor:
        start = self.start.to(coords.dtype)[layer]

        def along(axis: int, cells: Tensor) -> Tensor:
            time = cells[..., None] / self.layout.grid[axis]
            return runge_kutta(lambda t, p: self.velocity(axis, t, p), start[axis], time, self.steps)

        return summed(along, self.layout.cell(coords, grid), grid)

    def velocity(self, axis: int, time: Tensor, place: Tensor) -> Tensor:
        """h (…, C) at times (…, 1) and places (…, C) along an axis."""
        inner, bias, outer = (w[axis].to(place.dtype) for w in (self.inner, self.inner_bias, self.outer))
        return torch.tanh(torch.cat((time, place), dim=-1) @ inner + bias) @ outer


def runge_kutta(velocity: Callable[[Tensor, Tensor], Tensor], start: Tensor, time: Tensor, steps: int) -> Tensor:
    """Where a flow of `velocity(time, place)` is at times (…, 1), from `start` (C) at 0: (…, C), in equal steps."""
    place, step = start.expand(*time.shape[:-1], -1), time / steps
    for i in range(steps):
        now = i * step
        k1 = velocity(now, place)
        k2 = velocity(now + step / 2, place + step / 2 * k1)
        k3 = velocity(now + step / 2, place + step / 2 * k2)
        k4 = velocity(now + step, place + step * k3)
        place = place + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return place
