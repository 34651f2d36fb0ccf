"""Biases that are products of what queries and keys have of their own: they ride beside them and keep flash attention.

A bias Σ_c f_c(p_i) g_c(p_j) joins the logits without a mask when f_c and g_c are channels beside queries and keys.
Attention then takes as many channels more for each head, also of values, so it costs in proportion.

Shapes   L layers (1 if shared), H heads, D channels of a head, N tokens, channels beside (B, H, N, E)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..base import Layout, Position, check_pairs
from ..encoding import Encoding
from ..grids import is_whole, read, resample
from ..specs import register
from ..transform import Transform
from .base import Bias, constants


@register
class Sandwich(Bias):
    """The inner product of two tokens' sinusoids, weaker from head to head (arXiv:2212.10356).

    Σ_a Σ_j (cos(θ_j Δ_a) - 1) · H / 8h for head h = 1 … H, θ_j = base^(-j/P), of P = channels // 2A pairs for each
    axis, Δ in cells of the training grid. The sinusoids ride beside queries and keys, so no mask is needed, at the cost
    of `channels` + 1 channels more in every head; flash=False makes a bias instead, which is faster on grids of a few
    hundred cells. Raises ValueError where the channels are no pair for each axis.
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
        """Cosines and sines (B, 1, N, channels) of the cells at coordinates."""
        theta = self.angles(self.layout.cell(coords if coords.ndim == 3 else coords[None]))
        return torch.stack((theta.cos(), theta.sin()), dim=-1).flatten(2)[:, None]

    def angles(self, x: Tensor) -> Tensor:
        """Angles (…, A, P) of places or displacements (…, A)."""
        return x[..., None] * self.base ** (-torch.arange(self.pairs, dtype=x.dtype, device=x.device) / self.pairs)


class UntiedPositions(Position):
    """Logits (content · q_i · k_j + place · p_i U_q · p_j U_k) / sqrt(D) of tokens, and of learned vectors p of places.

    Vectors (*grid, C) are resampled to other grids as `learned` does it, normalised, and projected to all heads.
    """

    reversible = True
    relative = False
    unbounded = False

    def __init__(self, layout: Layout, layers: int, content: float, place: float) -> None:
        super().__init__()
        self.layout, self.content, self.place = layout, content, place
        self.table = nn.Parameter(torch.empty(*layout.grid, layout.width))
        self.projections = nn.Parameter(torch.empty(2, layers, layout.width, layout.heads * layout.head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.table, std=0.02)
        nn.init.trunc_normal_(self.projections, std=self.layout.width**-0.5)

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        table = self.table if grid is None else resample(self.table, grid)
        vectors = table.flatten(0, -2) if is_whole(coords, grid) else read(table, self.layout.cell(coords, grid))
        others = vectors if key_coords is None else read(table, self.layout.cell(key_coords, grid))
        return Encoding(
            Transform(extra=self.project(vectors, 0, self.place * self.layout.head_dim**-0.5)),
            Transform(extra=self.project(others, 1, 1.0)),
            scale=self.content,
        )

    def project(self, vectors: Tensor, side: int, factor: float) -> list[Tensor]:
        """Channels (B, H, N, D) of each layer, beside queries or keys, of vectors (N, C) or (B, N, C)."""
        vectors = F.layer_norm(vectors if vectors.ndim == 3 else vectors[None], vectors.shape[-1:]) * factor
        weights = self.projections[side].to(vectors.dtype).unbind(0)
        return [(vectors @ weight).unflatten(-1, (self.layout.heads, -1)).transpose(1, 2) for weight in weights]


@register
def tupe(layout: Layout) -> Position:
    """Content and place untied: (q_i · k_j + p_i U_q · p_j U_k) / sqrt(2D), shared by all layers (arXiv:2006.15595).

    TUPE-A; TUPE-R is "tupe + t5". Tokens without a place have logits of their content alone: θ_2, what all others add
    to a class token's, is 0, and θ_1, what it adds to theirs, is the same along its row, where a softmax sees nothing.
    """
    return UntiedPositions(layout, 1, content=2**-0.5, place=2**-0.5)


@register
def positiononly(layout: Layout) -> Position:
    """Attention by place alone, p_i U_q · p_j U_k / sqrt(D) for each layer, whatever the tokens hold: a control, the
    position half of arXiv:1805.01052 without the other. Tokens without a place are attended evenly."""
    return UntiedPositions(layout, layout.depth, content=0.0, place=1.0)
