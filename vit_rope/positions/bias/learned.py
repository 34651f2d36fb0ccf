"""Learned biases of the displacement: buckets, tables and kernels.

Displacements Δ = key - query are in cells of the training grid. Coordinates in a "centered" unit
spread a larger grid over the same cells, which resamples a table. With the unit "index",
displacements beyond the training grid have the value of its border.

Shapes   L layers (1 if shared), H heads, A axes, Δ (…, A), logits (L, H, …)
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base import Layout
from ..grids import interpolate
from ..specs import register
from .base import Bias, constants, length


@register
class T5(Bias):
    """A learned logit for each bucket of distances, summed over the axes (arXiv:1910.10683).

    All layers share it. For images this is the bias of UDOP (arXiv:2212.02623). Each direction has
    half of the buckets: one for each of the first buckets / 4 cells, then increasingly wide ones up
    to `max_distance`, by default the size of the training grid along the axis. Larger distances
    share the last bucket. On one axis the table (A, buckets, H) is that of T5, whose row buckets /
    2 is unused. Raises ValueError for a number of buckets not divisible by 4, or a max_distance
    within the cells that have a bucket each.
    """

    def __init__(self, layout: Layout, buckets: int = 32, max_distance: int | None = None) -> None:
        super().__init__(layout)
        exact = buckets // 4
        if buckets < 4 or buckets % 4:
            raise ValueError(f"t5 needs a number of buckets divisible by 4, got {buckets}")
        if max_distance is not None and max_distance <= exact:
            raise ValueError(
                f"t5 has a bucket for each of the first {exact} cells, so max_distance must be above that, "
                f"got {max_distance}; use fewer buckets or a larger max_distance"
            )
        self.buckets = buckets
        self.ends = [  # where the wider buckets start, along each axis
            [math.ceil(exact * (last / exact) ** (i / exact) - 1e-9) for i in range(1, exact)]
            for last in (max_distance or max(n, exact + 1) for n in layout.grid)
        ]
        self.table = nn.Parameter(torch.empty(layout.axes, buckets, layout.heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.table, std=0.02)

    def bucket(self, delta: Tensor) -> Tensor:
        """Return the buckets (…, A) of displacements (…, A), which are rounded to integers."""
        ends = torch.tensor(self.ends, device=delta.device)  # (A, buckets / 4 - 1)
        distance = delta.abs().round()
        wide = (distance[..., None] >= ends).sum(dim=-1)
        return (
            distance.clamp(max=self.buckets // 4).long() + wide + torch.where(delta.round() > 0, self.buckets // 2, 0)
        )

    def logits(self, delta: Tensor) -> Tensor:
        rows = self.bucket(delta) + self.buckets * torch.arange(delta.shape[-1], device=delta.device)
        return F.embedding(rows, self.table.flatten(0, 1).to(delta.dtype)).sum(dim=-2).movedim(-1, 0)[None]


@register
class Swin(Bias):
    """A learned logit for each displacement, layer and head (arXiv:2103.14030).

    The table (L, 2s - 1 for each axis, H) covers the training grid and is interpolated linearly.
    BEiT (arXiv:2106.08254), MaxViT and others use the same bias. Swin and timm's `RelPosBias`
    define Δ = query - key, so their `relative_position_bias_table` converts by `table.view(2h - 1,
    2w - 1, H).flip(0, 1)`, without BEiT's three rows for a class token. MaxViT's table needs no
    flip.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.table = nn.Parameter(torch.empty(layout.depth, *(2 * n - 1 for n in layout.grid), layout.heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.table, std=0.02)

    def logits(self, delta: Tensor) -> Tensor:
        layers, heads = self.table.shape[0], self.table.shape[-1]
        center = torch.tensor(self.layout.grid, device=delta.device) - 1
        values = interpolate(self.table.movedim(0, -1).flatten(-2).to(delta.dtype), delta + center)
        return values.unflatten(-1, (heads, layers)).movedim((-1, -2), (0, 1))


@register
class Kerple(Bias):
    """A learned, conditionally positive definite kernel of the distance ‖Δ‖ (arXiv:2205.09921).

    Each layer and head has its own r1 and r2, both positive. `kind` "log" is -r1 · ln(1 + r2 ‖Δ‖).
    "power" is -r1 · ‖Δ‖^r2 with r2 < 2, or r2 < 1 for the "manhattan" `distance`; with larger
    exponents the kernel would not be conditionally positive definite. The parameter `rates` (2, L,
    H) holds r1 and r2 before a softplus, and exponents before a sigmoid.
    """

    unbounded = True

    def __init__(
        self,
        layout: Layout,
        kind: Literal["log", "power"] = "log",
        distance: Literal["euclidean", "manhattan"] = "euclidean",
    ) -> None:
        super().__init__(layout)
        self.kind, self.distance = kind, distance
        self.max_exponent = 2.0 if distance == "euclidean" else 1.0
        self.rates = nn.Parameter(torch.empty(2, layout.depth, layout.heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw r1 and r2 uniformly: "log" up to 2 and 1, "power" up to 1 and `max_exponent`."""
        first, second = torch.rand_like(self.rates).clamp(0.01, 0.99)
        second = second.expm1().log() if self.kind == "log" else second.logit()
        first = ((2 if self.kind == "log" else 1) * first).expm1().log()
        with torch.no_grad():
            self.rates.copy_(torch.stack((first, second)))

    def logits(self, delta: Tensor) -> Tensor:
        first, second = constants(self.rates, delta)
        distance = length(delta, self.distance)
        if self.kind == "log":
            return -F.softplus(first) * torch.log1p(F.softplus(second) * distance)
        return -F.softplus(first) * distance ** (self.max_exponent * second.sigmoid())
