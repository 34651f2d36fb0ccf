"""Biases of the displacement alone that are learned: buckets, tables, kernels and small networks.

Displacements Δ = key - query are in cells of the training grid. Coordinates in a "centered" unit spread a larger grid
over the same cells, which resamples a table; with the unit "index" what lies beyond the training grid is at its border.

Shapes   L layers (1 if shared), H heads, A axes, Δ (…, A), logits (L, H, …)
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .absolute import read
from .base import Layout
from .bias import Bias, constants, length
from .encoding import Encoding
from .specs import register


@register
class T5(Bias):
    """A learned logit for each bucket of distances along each axis, summed over axes and shared by all layers
    (arXiv:1910.10683; for images as in UDOP, arXiv:2212.02623).

    Each direction has half the buckets: one for each of the first buckets / 4 cells, then wider and wider ones up to
    `max_distance`, the size of the training grid along the axis unless given; all beyond share the last. The table
    (A, buckets, H) is T5's own on one axis, its row buckets / 2 without use. Raises ValueError for buckets that do not
    divide by 4, or a max_distance that is no more than the cells with a bucket each.
    """

    def __init__(self, layout: Layout, buckets: int = 32, max_distance: int | None = None) -> None:
        super().__init__(layout)
        exact = buckets // 4
        if buckets < 4 or buckets % 4:
            raise ValueError(f"t5 needs a number of buckets that divides by 4, got {buckets}")
        if max_distance is not None and max_distance <= exact:
            raise ValueError(
                f"t5 has a bucket for each of the first {exact} cells, so max_distance must be above that, "
                f"got {max_distance}; use fewer buckets or a larger max_distance"
            )
        self.buckets = buckets
        self.ends = [  # where the wider buckets begin, along each axis
            [math.ceil(exact * (last / exact) ** (i / exact) - 1e-9) for i in range(1, exact)]
            for last in (max_distance or max(n, exact + 1) for n in layout.grid)
        ]
        self.table = nn.Parameter(torch.empty(layout.axes, buckets, layout.heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.table, std=0.02)

    def bucket(self, delta: Tensor) -> Tensor:
        """Buckets (…, A) of displacements (…, A), rounded to whole cells."""
        ends = torch.tensor(self.ends, device=delta.device)  # (A, buckets / 4 - 1)
        far = delta.abs().round()
        wide = (far[..., None] >= ends).sum(dim=-1)
        return far.clamp(max=self.buckets // 4).long() + wide + torch.where(delta.round() > 0, self.buckets // 2, 0)

    def logits(self, delta: Tensor) -> Tensor:
        rows = self.bucket(delta) + self.buckets * torch.arange(delta.shape[-1], device=delta.device)
        return F.embedding(rows, self.table.flatten(0, 1).to(delta.dtype)).sum(dim=-2).movedim(-1, 0)[None]


@register
class Swin(Bias):
    """A learned logit for each displacement on the training grid, for each layer and head (arXiv:2103.14030).

    The table (L, 2s - 1 for each axis, H) is read by linear interpolation. BEiT (arXiv:2106.08254), MaxViT and others
    have the same. Swin and timm's `RelPosBias` count Δ = query - key: their `relative_position_bias_table` is ours as
    `table.view(2h - 1, 2w - 1, H).flip(0, 1)`, without BEiT's three rows for a class token; MaxViT's needs no flip.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.table = nn.Parameter(torch.empty(layout.depth, *(2 * n - 1 for n in layout.grid), layout.heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.table, std=0.02)

    def logits(self, delta: Tensor) -> Tensor:
        layers, heads = self.table.shape[0], self.table.shape[-1]
        middle = torch.tensor(self.layout.grid, device=delta.device) - 1
        values = read(self.table.movedim(0, -1).flatten(-2).to(delta.dtype), delta + middle)
        return values.unflatten(-1, (heads, layers)).movedim((-1, -2), (0, 1))


@register
class Kerple(Bias):
    """A conditionally positive definite kernel of the distance ‖Δ‖, learned for each layer and head (arXiv:2205.09921).

    `kind` "log" is -r1 · ln(1 + r2 ‖Δ‖), "power" is -r1 · ‖Δ‖^r2 with r2 below 2, or below 1 for the "manhattan"
    `distance`, beyond which it is no such kernel; r1 and r2 stay positive. `rates` (2, L, H) hold them before a
    softplus, and an exponent before a sigmoid.
    """

    extrapolates = True

    def __init__(
        self,
        layout: Layout,
        kind: Literal["log", "power"] = "log",
        distance: Literal["euclidean", "manhattan"] = "euclidean",
    ) -> None:
        super().__init__(layout)
        self.kind, self.distance = kind, distance
        self.most = 2.0 if distance == "euclidean" else 1.0  # of an exponent
        self.rates = nn.Parameter(torch.empty(2, layout.depth, layout.heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw log rates from 0 to 2 and 0 to 1, power rates from 0 to 1 and 0 to their limit."""
        first, second = torch.rand_like(self.rates).clamp(0.01, 0.99)
        second = second.expm1().log() if self.kind == "log" else second.logit()
        first = ((2 if self.kind == "log" else 1) * first).expm1().log()
        with torch.no_grad():
            self.rates.copy_(torch.stack((first, second)))

    def logits(self, delta: Tensor) -> Tensor:
        first, second = constants(self.rates, delta)
        far = length(delta, self.distance)
        if self.kind == "log":
            return -F.softplus(first) * torch.log1p(F.softplus(second) * far)
        return -F.softplus(first) * far ** (self.most * second.sigmoid())


class Perceptrons(nn.Module):
    """A network of one hidden layer for each of L: inputs (L or 1, X, I) to outputs (L, X, O), without a bias there,
    which a softmax would not see."""

    def __init__(self, layers: int, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"a network of positions needs a width of at least 1, got {width}")
        self.inward = nn.Parameter(torch.empty(layers, inputs, width))
        self.bias = nn.Parameter(torch.empty(layers, 1, width))
        self.outward = nn.Parameter(torch.empty(layers, width, outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights as `nn.Linear` does."""
        for weight, fan in ((self.inward, self.inward), (self.bias, self.inward), (self.outward, self.outward)):
            nn.init.uniform_(weight, -(fan.shape[1] ** -0.5), fan.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        inward, bias, outward = (t.to(x.dtype) for t in (self.inward, self.bias, self.outward))
        return (x @ inward + bias).relu() @ outward


@register
class LogCPB(Bias):
    """A small network of the logarithms of the displacement, for each layer: Swin v2's (arXiv:2111.09883).

    16 · sigmoid(network(u)), u_a = sign(Δ_a) · log2(1 + 8 |Δ_a| / (s_a - 1)) / 3 on a training grid of size s, with
    `width` hidden channels. Swin v2 and timm's `RelPosMlp` count Δ = query - key: negate the first layer's weights.
    """

    extrapolates = True
    costly = True

    def __init__(self, layout: Layout, width: int = 512) -> None:
        super().__init__(layout)
        self.network = Perceptrons(layout.depth, layout.axes, width, layout.heads)

    def logits(self, delta: Tensor) -> Tensor:
        reach = torch.tensor([max(n - 1, 1) for n in self.layout.grid], device=delta.device)
        inputs = delta.sign() * torch.log2(1 + 8 * delta.abs() / reach) / 3
        values = 16 * self.network(inputs.view(1, -1, inputs.shape[-1])).sigmoid()
        return values.transpose(1, 2).unflatten(-1, delta.shape[:-1])


@register
class FIRE(Bias):
    """A small network of the logarithm of the distance relative to the grid's, for each layer (arXiv:2310.04418).

    network(ln(1 + c ‖Δ‖) / ln(1 + c R)), with `width` hidden channels and a learned c. R is the longest displacement of
    the grid that the tokens come from, or of the training grid if that is larger or there is no grid: larger grids are
    squeezed into the distances that training has seen.
    """

    extrapolates = True
    costly = True

    def __init__(
        self, layout: Layout, width: int = 32, distance: Literal["euclidean", "manhattan"] = "euclidean"
    ) -> None:
        super().__init__(layout)
        self.distance = distance
        self.network = Perceptrons(layout.depth, 1, width, layout.heads)
        self.rates = nn.Parameter(torch.empty(layout.depth))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.rates, 0.1)

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        sizes = self.layout.grid if grid is None else grid
        logits = partial(
            self.logits, reach=torch.maximum(self.reach(sizes, coords), self.reach(self.layout.grid, coords))
        )
        return self.placed(logits, coords, key_coords, grid)

    def reach(self, grid: Sequence[int], like: Tensor) -> Tensor:
        """The longest displacement () on a grid, or 1 if that is longer."""
        ends = self.layout.cell(self.layout.coords(grid, like.device).to(like.dtype))
        return length(ends[-1] - ends[0], self.distance).clamp(min=1)

    def logits(self, delta: Tensor, reach: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        rates = self.rates.abs().to(delta.dtype)[:, None]  # (L, 1)
        far = length(delta, self.distance)
        relative = torch.log1p(rates * far.flatten()) / torch.log1p(rates * reach)
        return self.network(relative[..., None]).transpose(1, 2).unflatten(-1, far.shape)
