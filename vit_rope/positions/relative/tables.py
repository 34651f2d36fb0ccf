"""Relative schemes whose vectors r come from tables of displacements: learned, or made of
sinusoids.

The formulas below have a vector r_a[Δ_a] of a head's channels for each displacement Δ = key - query
along an axis a, in cells of the training grid.

Shapes   L layers, H heads (1 if shared), D channels of a head, A axes,
         T displacements along an axis; tables (L, H, T, D)
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .. import displacements
from ..base import Layout, check_pairs
from ..encoding import ActsOn, Encoding, RelativeTerm
from ..grids import interpolate
from ..specs import register
from .base import RelativeTerms, by_layer, clipped_rows, sinusoids


@register
class Shaw(RelativeTerms):
    """q_i · (k_j + Σ_a r_a[Δ_a]) / sqrt(D), with learned tables r (arXiv:1803.02155).

    Each layer has its own r, shared by its heads. Displacements beyond `clip` cells are clipped. By
    default this is the largest displacement of the training grid; on images the terms are then
    those of BoTNet (arXiv:2101.11605). With values=True, Σ_j a_ij w_a[Δ_a] from a second table is
    added to the outputs. Raises ValueError for a clip below 1.
    """

    def __init__(self, layout: Layout, clip: int | None = None, values: bool = False) -> None:
        super().__init__(layout)
        if clip is not None and clip < 1:
            raise ValueError(f"shaw needs a clip of at least 1 cell, got {clip}")
        self.clip = [max(n - 1, 0) if clip is None else clip for n in layout.grid]
        count = sum(2 * n + 1 for n in self.clip)
        self.keys = nn.Parameter(torch.empty(layout.depth, 1, count, layout.head_dim))
        self.values = nn.Parameter(torch.empty_like(self.keys)) if values else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    def rows(self, axis: int, line: Tensor) -> list[tuple[ActsOn, Tensor]]:
        start = sum(2 * n + 1 for n in self.clip[:axis])
        index = clipped_rows(line, self.clip[axis]) + start
        rows: list[tuple[ActsOn, Tensor]] = [("q", self.keys[:, :, index])]
        return rows if self.values is None else [*rows, ("v", self.values[:, :, index])]


@register
class Nezha(RelativeTerms):
    """The terms of Shaw on keys and values, with fixed sinusoids as tables (arXiv:1909.00204).

    Each axis has an equal share of the channels of a head, so that rows and columns differ. Raises
    ValueError for a head without a pair of channels for each axis, or a base of 0 or less.
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
    """q_i · Σ_a r_a[Δ_a] of unscaled queries: MViTv2 (arXiv:2112.01526) and SAM (arXiv:2304.02643).

    The tables have 2s - 1 rows for each axis and layer, are shared by heads, and are interpolated
    linearly. MViTv2 and SAM define Δ = query - key, so the table is their `rel_pos_h` and
    `rel_pos_w`, each flipped, concatenated.
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
        rows = interpolate(table.flatten(1).to(line.dtype), line[:, None] + (self.layout.grid[axis] - 1))
        rows = rows.unflatten(-1, table.shape[1:]).transpose(0, 1)[:, None]
        return [("q", rows * math.sqrt(self.layout.head_dim))]


@register
class IRPE(RelativeTerms):
    """q_i · r[bucket(Δ)] / sqrt(D), r learned for each layer, shared by heads (arXiv:2107.14222).

    Along an axis a bucket is round(Δ) up to α cells. Beyond that it is
    α + ln(|Δ|/α) / ln(γ/α) · (β - α), rounded and limited to β, with the sign of Δ and
    α, β, γ = ratio · (1, 2, 8).

    `method` is one of:

    - "product": a row for each combination of the buckets of all axes.
    - "cross": the sum of a row for each axis.
    - "euclidean": a row for each bucket of the distance, which is rounded.
    - "quant": a row for each bucket of the squared distance.

    `on` "k" is the formula above. "qk" also adds k_j · r to the logits, and "qkv" also adds Σ_j
    a_ij r to the outputs, each with its own table. Raises ValueError for a ratio below 1.
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
        acts_on: dict[str, tuple[ActsOn, ...]] = {"k": ("q",), "qk": ("q", "k"), "qkv": ("q", "k", "v")}
        self.acts_on = acts_on[on]
        self.max_bucket = int(2 * ratio)
        count = 2 * self.max_bucket + 1
        rows = {"product": count**layout.axes, "cross": count * layout.axes}.get(method, self.max_bucket + 1)
        self.table = nn.Parameter(torch.empty(len(self.acts_on), layout.depth, 1, rows, layout.head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.table, std=0.02)

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        lines, index = displacements.along_axes(self.layout, coords, key_coords, grid)
        delta, pair_index = displacements.combine_axes(lines, index)
        terms = []
        for rows in self.buckets(delta):
            pair_rows = displacements.look_up(rows, pair_index)
            for acts_on, tables in zip(self.acts_on, self.table, strict=True):
                terms.append([RelativeTerm(table, pair_rows, acts_on) for table in tables])
        return Encoding(term_lists=by_layer(terms))

    def buckets(self, delta: Tensor) -> list[Tensor]:
        """Return lists of rows (T,) of displacements (T, A): one, or one for each axis."""
        if self.method == "euclidean":
            return [self.bucket(delta.norm(dim=-1).round())]
        if self.method == "quant":
            return [self.bucket(delta.square().sum(dim=-1))]
        buckets, count = self.bucket(delta) + self.max_bucket, 2 * self.max_bucket + 1
        if self.method == "cross":
            return [buckets[:, a] + a * count for a in range(buckets.shape[-1])]
        rows = delta.new_zeros((), dtype=torch.long)
        for a in range(buckets.shape[-1]):
            rows = rows * count + buckets[:, a]
        return [rows]

    def bucket(self, delta: Tensor) -> Tensor:
        """Return the buckets, from -β to β, of displacements or distances of any shape."""
        alpha, beta, gamma = self.ratio, 2 * self.ratio, 8 * self.ratio
        distance = delta.abs().clamp(min=alpha)
        wide = alpha + (distance / alpha).log() / math.log(gamma / alpha) * (beta - alpha)
        wide = wide.round().clamp(max=self.max_bucket) * delta.sign()
        return torch.where(delta.abs() <= alpha, delta.round(), wide).long()
