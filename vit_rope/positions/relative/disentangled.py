"""Disentangled attention: separate terms for content and position, with projected vectors of
positions.

Transformer-XL and DeBERTa expand the product of (content + position) of a query and of a key.
Position is the displacement Δ = key - query along each axis, and each term of the product has its
own weights.

Shapes   L layers, H heads, D channels of a head, A axes,
         T displacements along an axis; tables (L, H, T, D)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import displacements
from ..base import Layout, check_pairs
from ..encoding import ActsOn, Encoding, RelativeTerm
from ..specs import register
from .base import RelativeTerms, by_layer, clipped_rows, sinusoids


@register
class TransformerXL(RelativeTerms):
    """((q_i + u) · k_j + (q_i + v) · Σ_a W_a R(Δ_a)) / sqrt(D), R sinusoids (arXiv:1901.02860).

    XLNet (arXiv:1906.08237) has the same terms. u, v (L, H, D) and W (L, A, channels, H · D) are
    learned. R has an equal share of the width for each axis. The papers define Δ = query - key,
    which only changes the sign of the sines. Raises ValueError for a width without a pair of
    channels for each axis, or a base of 0 or less.
    """

    def __init__(self, layout: Layout, base: float = 10000.0) -> None:
        super().__init__(layout)
        if base <= 0:
            raise ValueError(f"transformerxl needs a positive base, got {base}")
        self.base, self.pairs = base, check_pairs("transformerxl", layout.width, layout.axes)
        heads, channels = layout.heads, layout.head_dim
        self.weight = nn.Parameter(torch.empty(layout.depth, layout.axes, 2 * self.pairs, heads * channels))
        self.u = nn.Parameter(torch.empty(layout.depth, heads, channels))
        self.v = nn.Parameter(torch.empty(layout.depth, heads, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.trunc_normal_(parameter, std=0.02)

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        lines, index = displacements.along_axes(self.layout, coords, key_coords, grid)
        key_terms = [RelativeTerm(u[:, None], torch.zeros_like(index[0]), "k") for u in self.u]  # u · k_j
        terms = [key_terms]
        for axis, (line, axis_index) in enumerate(zip(lines, index, strict=True)):
            tables = self.rows(axis, line)[0][1]
            terms.append([RelativeTerm(table, axis_index, "q") for table in tables])
            biases = (self.v.to(line.dtype)[:, :, None] * tables).sum(dim=-1, keepdim=True)  # (L, H, T, 1)
            terms.append([RelativeTerm(bias * self.layout.head_dim**-0.5, axis_index, "logits") for bias in biases])
        return Encoding(term_lists=by_layer(terms))

    def rows(self, axis: int, line: Tensor) -> list[tuple[ActsOn, Tensor]]:
        table = sinusoids(line, self.pairs, self.base) @ self.weight[:, axis].to(line.dtype)  # (L, T, H · D)
        return [("q", table.unflatten(-1, (self.layout.heads, -1)).transpose(1, 2))]


@register
class DeBERTa(RelativeTerms):
    """(q_i · k_j + Σ_a (q_i · K_a[Δ_a] + k_j · Q_a[-Δ_a])) / sqrt((1 + 2A) D) (arXiv:2006.03654).

    K and Q are projections, for each layer, of vectors (rows, C) of the displacement that all
    layers share. From a key, the query is at -Δ. On one axis the scale is the paper's sqrt(3D).
    Displacements beyond `clip` cells are clipped; the default is the largest displacement of the
    training grid. Raises ValueError for a clip below 1.
    """

    def __init__(self, layout: Layout, clip: int | None = None) -> None:
        super().__init__(layout)
        if clip is not None and clip < 1:
            raise ValueError(f"deberta needs a clip of at least 1 cell, got {clip}")
        self.clip = [max(n - 1, 0) if clip is None else clip for n in layout.grid]
        self.vectors = nn.Parameter(torch.empty(sum(2 * n + 1 for n in self.clip), layout.width))
        self.projections = nn.Parameter(torch.empty(2, layout.depth, layout.width, layout.heads * layout.head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.vectors, std=1.0)
        nn.init.trunc_normal_(self.projections, std=0.02)

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        return super().encode(coords, key_coords, grid)._replace(scale=(1 + 2 * self.layout.axes) ** -0.5)

    def rows(self, axis: int, line: Tensor) -> list[tuple[ActsOn, Tensor]]:
        clip, start = self.clip[axis], sum(2 * n + 1 for n in self.clip[:axis])
        vectors = (self.vectors[clipped_rows(delta, clip) + start] for delta in (line, -line))
        tables = (v @ weight for v, weight in zip(vectors, self.projections, strict=True))
        keys, queries = (table.unflatten(-1, (self.layout.heads, -1)).transpose(1, 2) for table in tables)
        return [("q", keys), ("k", queries)]
