"""Content and place disentangled: what each is to the other, as projections of vectors that places have.

Transformer-XL and DeBERTa spell out the product of (content + place) of a query and of a key, with the place taken from
the displacement Δ = key - query along each axis, and give each part weights of its own.

Shapes   L layers, H heads, D channels of a head, A axes, T displacements along an axis, tables (L, H, T, D)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import displacements
from ..base import Layout, check_pairs
from ..encoding import ActsOn, Encoding, RelativeTerm
from ..specs import register
from .base import RelativeTerms, by_layer, clipped, sinusoids


@register
class TransformerXL(RelativeTerms):
    """((q_i + u) · k_j + (q_i + v) · Σ_a W_a R(Δ_a)) / sqrt(D), of sinusoids R (arXiv:1901.02860; XLNet,
    arXiv:1906.08237).

    u, v (L, H, D) and W (L, A, channels, H · D) are learned; R has an equal share of the width for each axis. Those
    papers count Δ = query - key, which only turns the sign of R's sines. Raises ValueError for a width without a pair
    of channels for each axis.
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
        key_alone = [RelativeTerm(u[:, None], torch.zeros_like(index[0]), "k") for u in self.u]
        terms = [key_alone]
        for axis, (line, at) in enumerate(zip(lines, index, strict=True)):
            tables = self.rows(axis, line)[0][1]
            terms.append([RelativeTerm(table, at, "q") for table in tables])
            place_alone = (self.v.to(line.dtype)[:, :, None] * tables).sum(dim=-1, keepdim=True)  # (L, H, T, 1)
            terms.append([RelativeTerm(row * self.layout.head_dim**-0.5, at, "logits") for row in place_alone])
        return Encoding(term_lists=by_layer(terms))

    def rows(self, axis: int, line: Tensor) -> list[tuple[ActsOn, Tensor]]:
        found = sinusoids(line, self.pairs, self.base) @ self.weight[:, axis].to(line.dtype)  # (L, T, H · D)
        return [("q", found.unflatten(-1, (self.layout.heads, -1)).transpose(1, 2))]


@register
class DeBERTa(RelativeTerms):
    """(q_i · k_j + Σ_a (q_i · K_a[Δ_a] + k_j · Q_a[-Δ_a])) / sqrt((1 + 2A) D), disentangled (arXiv:2006.03654).

    K and Q are projections, for each layer, of vectors P of the displacement (rows, C) that all layers share; a key
    sees the query at -Δ. On one axis that is the paper's sqrt(3D). Displacements beyond `clip` cells, the training
    grid's own reach unless given, count as `clip`. Raises ValueError for a clip below 1.
    """

    def __init__(self, layout: Layout, clip: int | None = None) -> None:
        super().__init__(layout)
        if clip is not None and clip < 1:
            raise ValueError(f"deberta needs a clip of at least 1 cell, got {clip}")
        self.reach = [max(n - 1, 0) if clip is None else clip for n in layout.grid]
        self.vectors = nn.Parameter(torch.empty(sum(2 * n + 1 for n in self.reach), layout.width))
        self.projections = nn.Parameter(torch.empty(2, layout.depth, layout.width, layout.heads * layout.head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.vectors, std=1.0)
        nn.init.trunc_normal_(self.projections, std=0.02)

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        return super().encode(coords, key_coords, grid)._replace(scale=(1 + 2 * self.layout.axes) ** -0.5)

    def rows(self, axis: int, line: Tensor) -> list[tuple[ActsOn, Tensor]]:
        reach, start = self.reach[axis], sum(2 * n + 1 for n in self.reach[:axis])
        there, back = (self.vectors[clipped(delta, reach) + start] for delta in (line, -line))
        tables = (vectors @ weight for vectors, weight in zip((there, back), self.projections, strict=True))
        keys, queries = (table.unflatten(-1, (self.layout.heads, -1)).transpose(1, 2) for table in tables)
        return [("q", keys), ("k", queries)]
