"""Biases that are inner products, computed by extra channels of queries and keys, so flash
attention works.

A bias of the form Σ_c f_c(p_i) g_c(p_j) needs no mask: f_c are extra channels of the queries, and
g_c are extra channels of the keys. Attention then has more channels in each head, also in its
values, and its cost grows in proportion.

Shapes   B samples, L layers (1 if shared), H heads, D channels of a head, N tokens, A axes,
         C channels of a token, P frequencies of an axis, extra channels (B, H, N, E)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base import Layout, Position, check_pairs
from ..encoding import Encoding
from ..grids import interpolate, is_full_grid, resample
from ..specs import register
from ..transform import Transform
from .base import Bias, constants


@register
class Sandwich(Bias):
    """The inner product of the sinusoids of two tokens (arXiv:2212.10356).

    The bias is Σ_a Σ_j (cos(θ_j Δ_a) - 1) · H / 8h for head h = 1 … H, with θ_j = base^(-j/P) and P
    = channels // 2A pairs for each axis, and Δ in cells of the training grid. The sinusoids are
    extra channels of queries and keys, so no mask is needed, but every head has `channels` + 1 more
    channels. flash=False computes a bias instead, which is faster on grids of a few hundred cells.
    Raises ValueError for fewer channels than a pair for each axis, or a base of 0 or less.
    """

    unbounded = True

    def __init__(self, layout: Layout, channels: int = 128, base: float = 10000.0, flash: bool = True) -> None:
        super().__init__(layout)
        self.pairs, self.base = check_pairs("sandwich", channels, layout.axes), base
        if base <= 0:
            raise ValueError(f"sandwich needs a positive base, got {base}")
        self.gains = [[layout.heads / (8 * h) for h in range(1, layout.heads + 1)]]
        self.keeps_flash = flash

    def logits(self, delta: Tensor) -> Tensor:
        return constants(self.gains, delta) * (self.angles(delta).cos() - 1).sum(dim=(-2, -1))

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        if not self.keeps_flash:
            return super().encode(coords, key_coords, grid)
        q = self.sinusoids(coords)
        k = q if key_coords is None else self.sinusoids(key_coords)
        count = q.new_full((*q.shape[:-1], 1), -(q.shape[-1] // 2))
        q = torch.cat((q, count), dim=-1) * constants(self.gains, q[0])
        return Encoding(q=Transform(extra=[q]), k=Transform(extra=[F.pad(k, (0, 1), value=1.0)]))

    def sinusoids(self, coords: Tensor) -> Tensor:
        """Return the cosines and sines (B, 1, N, channels) of the cells at coordinates."""
        theta = self.angles(self.layout.cell(coords if coords.ndim == 3 else coords[None]))
        return torch.stack((theta.cos(), theta.sin()), dim=-1).flatten(2)[:, None]

    def angles(self, x: Tensor) -> Tensor:
        """Return the angles (…, A, P) of cells or displacements (…, A)."""
        return x[..., None] * self.base ** (-torch.arange(self.pairs, dtype=x.dtype, device=x.device) / self.pairs)


class UntiedPositions(Position):
    """Logits (content · q_i · k_j + position · p_i U_q · p_j U_k) / sqrt(D), with learned p.

    `content` and `position` are constant weights. p are vectors of positions; their table (*grid,
    C) is resampled to other grids as by `learned`. Vectors are normalized and projected to all
    heads.
    """

    reversible = True
    relative = False
    unbounded = False

    def __init__(self, layout: Layout, layers: int, content: float, position: float) -> None:
        super().__init__()
        self.layout, self.content, self.position = layout, content, position
        self.table = nn.Parameter(torch.empty(*layout.grid, layout.width))
        self.projections = nn.Parameter(torch.empty(2, layers, layout.width, layout.heads * layout.head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.table, std=0.02)
        nn.init.trunc_normal_(self.projections, std=self.layout.width**-0.5)

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        table = self.table if grid is None else resample(self.table, grid)
        if is_full_grid(coords, grid):
            queries = table.flatten(0, -2)
        else:
            queries = interpolate(table, self.layout.cell(coords, grid))
        keys = queries if key_coords is None else interpolate(table, self.layout.cell(key_coords, grid))
        return Encoding(
            Transform(extra=self.project(queries, 0, self.position * self.layout.head_dim**-0.5)),
            Transform(extra=self.project(keys, 1, 1.0)),
            scale=self.content,
        )

    def project(self, vectors: Tensor, index: int, factor: float) -> list[Tensor]:
        """Project vectors (N, C) or (B, N, C) to extra channels (B, H, N, D) of each layer.

        `index` selects the projection: 0 for queries, 1 for keys.
        """
        vectors = F.layer_norm(vectors if vectors.ndim == 3 else vectors[None], vectors.shape[-1:]) * factor
        weights = self.projections[index].to(vectors.dtype).unbind(0)
        return [(vectors @ weight).unflatten(-1, (self.layout.heads, -1)).transpose(1, 2) for weight in weights]


@register
def tupe(layout: Layout) -> Position:
    """Content and position untied: (q_i · k_j + p_i U_q · p_j U_k) / sqrt(2D) (arXiv:2006.15595).

    All layers share the positions. This is TUPE-A; TUPE-R is "tupe + t5". Tokens without a position
    have logits of their content only. Of the paper's two constants for the class token, θ_2 (other
    tokens to the class token) is 0 here, and θ_1 (the class token to others) is the same along its
    row, so the softmax cancels it.
    """
    return UntiedPositions(layout, 1, content=2**-0.5, position=2**-0.5)


@register
def positiononly(layout: Layout) -> Position:
    """Attention by position only, p_i U_q · p_j U_k / sqrt(D) for each layer: a control.

    The content of tokens has no effect on the weights. This is the position half of
    arXiv:1805.01052 without the content half. Tokens without a position are attended to uniformly.
    """
    return UntiedPositions(layout, layout.depth, content=0.0, position=1.0)
