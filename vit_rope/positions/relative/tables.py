"""Terms of content and displacement together: what a query thinks of keys that lie so far from it, and keys of queries.

A scheme here gives each displacement along an axis a vector r of a head's channels; attention adds q_i · r_ij to the
logits ("q" below), k_j · r_ij ("k"), or Σ_j a_ij r_ij to the outputs ("v"), for each axis. Products are taken once for
each row of such a table and looked up by pairs, so no N x M x D tensor is made; flash kernels have no room for them.

Displacements Δ = key - query are in cells of the training grid. Those of a whole grid are taken as they are; tokens at
coordinates of their own see theirs rounded to cells of the grid, and those beyond it as at its border.

Shapes   L layers, H heads (1 if shared), D channels of a head, A axes, T displacements along an axis
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .. import displacements
from ..base import Layout, check_pairs
from ..encoding import ActsOn, Encoding, RelativeTerm
from ..grids import read
from ..specs import register
from .base import RelativeTerms, by_layer, clipped, sinusoids


@register
class Shaw(RelativeTerms):
    """q_i · (k_j + Σ_a r_a[Δ_a]) / sqrt(D), r learned for each layer and shared by heads (arXiv:1803.02155).

    Displacements beyond `clip` cells, the training grid's own reach unless given, count as `clip`. With values=True
    outputs gain Σ_j a_ij w_a[Δ_a] of a second table. On images with the whole grid's reach these are BoTNet's terms
    (arXiv:2101.11605). Raises ValueError for a clip below 1.
    """

    def __init__(self, layout: Layout, clip: int | None = None, values: bool = False) -> None:
        super().__init__(layout)
        if clip is not None and clip < 1:
            raise ValueError(f"shaw needs a clip of at least 1 cell, got {clip}")
        self.reach = [max(n - 1, 0) if clip is None else clip for n in layout.grid]
        count = sum(2 * n + 1 for n in self.reach)
        self.keys = nn.Parameter(torch.empty(layout.depth, 1, count, layout.head_dim))
        self.values = nn.Parameter(torch.empty_like(self.keys)) if values else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    def rows(self, axis: int, line: Tensor) -> list[tuple[ActsOn, Tensor]]:
        start = sum(2 * n + 1 for n in self.reach[:axis])
        at = clipped(line, self.reach[axis]) + start
        rows: list[tuple[ActsOn, Tensor]] = [("q", self.keys[:, :, at])]
        return rows if self.values is None else [*rows, ("v", self.values[:, :, at])]


@register
class Nezha(RelativeTerms):
    """Shaw's terms on keys and values with fixed sinusoids of the displacement for tables (arXiv:1909.00204).

    Each axis has an equal share of a head's channels, so that rows and columns differ. Raises ValueError for a head
    without a pair of channels for each axis.
    """

    def __init__(self, layout: Layout, base: float = 10000.0) -> None:
        super().__init__(layout)
        if base <= 0:
            raise ValueError(f"nezha needs a positive base, got {base}")
        self.base, self.pairs = base, check_pairs("nezha", layout.head_dim, layout.axes)

    def rows(self, axis: int, line: Tensor) -> list[tuple[ActsOn, Tensor]]:
        waves, before = sinusoids(line, self.pairs, self.base), 2 * self.pairs * axis
        table = nn.functional.pad(waves, (before, self.layout.head_dim - before - waves.shape[-1]))[None, None]
        return [("q", table), ("v", table)]


@register
class Decomposed(RelativeTerms):
    """q_i · Σ_a r_a[Δ_a], of queries that are not scaled: MViTv2's (arXiv:2112.01526) and SAM's (arXiv:2304.02643).

    Tables of 2s - 1 rows for each axis and layer, shared by heads, are read by linear interpolation. Both count
    Δ = query - key: their `rel_pos_h` and `rel_pos_w` are ours flipped, one after the other.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.table = nn.Parameter(torch.empty(layout.depth, sum(2 * n - 1 for n in layout.grid), layout.head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.table, std=0.02)

    def rows(self, axis: int, line: Tensor) -> list[tuple[ActsOn, Tensor]]:
        sizes = [2 * n - 1 for n in self.layout.grid]
        table = self.table.split(sizes, dim=1)[axis].transpose(0, 1)  # (2s - 1, L, D)
        found = read(table.flatten(1).to(line.dtype), line[:, None] + (self.layout.grid[axis] - 1))
        found = found.unflatten(-1, table.shape[1:]).transpose(0, 1)[:, None]
        return [("q", found * math.sqrt(self.layout.head_dim))]


@register
class IRPE(RelativeTerms):
    """q_i · r[bucket(Δ)] / sqrt(D) of buckets of the image (arXiv:2107.14222), learned for each layer, shared by heads.

    Along an axis a bucket is round(Δ) up to α cells, then α + ln(|Δ|/α) / ln(γ/α) · (β - α), rounded and cut at β, with
    α, β, γ = ratio · (1, 2, 8). `method` "product" has a row for each combination of the axes' buckets, "cross" adds a
    row for each axis, "euclidean" has one for each bucket of the rounded distance, "quant" of its square. `on` "qk"
    also adds k_j · r, and "qkv" Σ_j a_ij r to the outputs, each of a table of its own. Raises ValueError for a ratio
    below 1.
    """

    def __init__(
        self,
        layout: Layout,
        method: Literal["product", "cross", "euclidean", "quant"] = "product",
        on: Literal["k", "qk", "qkv"] = "k",
        ratio: float = 1.9,
    ) -> None:
        super().__init__(layout)
        if ratio < 1:
            raise ValueError(f"irpe needs a ratio of at least 1, got {ratio}")
        self.method, self.ratio = method, ratio
        sides: dict[str, tuple[ActsOn, ...]] = {"k": ("q",), "qk": ("q", "k"), "qkv": ("q", "k", "v")}
        self.sides = sides[on]
        self.most = int(2 * ratio)
        side = 2 * self.most + 1
        rows = {"product": side**layout.axes, "cross": side * layout.axes}.get(method, self.most + 1)
        self.table = nn.Parameter(torch.empty(len(self.sides), layout.depth, 1, rows, layout.head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.table, std=0.02)

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        lines, index = displacements.along_axes(self.layout, coords, key_coords, grid)
        delta, at = displacements.across_axes(lines, index)
        terms = []
        for row in self.buckets(delta):
            where = displacements.look_up(row, at)
            terms += [
                [RelativeTerm(t, where, on) for t in table] for on, table in zip(self.sides, self.table, strict=True)
            ]
        return Encoding(term_lists=by_layer(terms))

    def buckets(self, delta: Tensor) -> list[Tensor]:
        """Rows (T,) of displacements (T, A): one of each, or one for each axis."""
        if self.method == "euclidean":
            return [self.bucket(delta.norm(dim=-1).round())]
        if self.method == "quant":
            return [self.bucket(delta.square().sum(dim=-1))]
        each, side, rows = self.bucket(delta) + self.most, 2 * self.most + 1, delta.new_zeros((), dtype=torch.long)
        if self.method == "cross":
            return [each[:, a] + a * side for a in range(each.shape[-1])]
        for a in range(each.shape[-1]):
            rows = rows * side + each[:, a]
        return [rows]

    def bucket(self, delta: Tensor) -> Tensor:
        """Buckets from -β to β of displacements, or of distances, of any shape."""
        near, far, end = self.ratio, 2 * self.ratio, 8 * self.ratio
        size = delta.abs().clamp(min=near)
        wide = near + (size / near).log() / math.log(end / near) * (far - near)
        wide = wide.round().clamp(max=self.most) * delta.sign()
        return torch.where(delta.abs() <= near, delta.round(), wide).long()
