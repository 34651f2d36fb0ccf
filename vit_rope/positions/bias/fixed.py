"""Biases of the displacement alone: what is added to scaled logits, whatever the tokens hold.

A scheme here is a function from displacements Δ = key - query, in cells of the training grid, to logits for each layer
and head. To add one, subclass `Bias` and write `logits`. On a whole grid it is evaluated once for each of the
prod(2s - 1) displacements and looked up by pairs; tokens at coordinates of their own have one for each pair.

Shapes   L layers (1 if shared), H heads, N queries, M keys, A axes, Δ (…, A), logits (L, H, …)
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..base import Layout
from ..encoding import Encoding
from ..specs import register
from ..transform import Transform
from .base import Bias, constants, length

HIDDEN = -1e4  # as good as -inf after a softmax, but where all keys are hidden it leaves no NaN; fits float16


def slopes(heads: int) -> list[float]:
    """ALiBi's slopes 2^(-8h/H), h = 1 … H; where H is no power of two, those of the power below, then every other one
    of the power above (arXiv:2108.12409)."""
    below = 2 ** int(math.log2(heads))
    powers = [8 * h / below for h in range(1, below + 1)] + [4 * h / below for h in range(1, 2 * below, 2)]
    return [2.0**-power for power in powers[:heads]]


@register
class ALiBi(Bias):
    """A penalty -m_h ‖Δ‖ that grows with distance, at a slope m_h for each head (arXiv:2108.12409).

    `distance` is "euclidean" (2-D ALiBi of CROMA, arXiv:2311.00566), "manhattan", or "quadratic", -m_h ‖Δ‖², which
    needs no mask and keeps flash attention: ‖Δ‖² is a product of A + 4 channels beside the queries and keys, made of
    coordinates that are counted from their middle. In bfloat16 those channels are exact, products included, for whole
    cells within 256 of the middle and slopes that are powers of two, as of 1, 2, 3, 4, 6 or 8 heads; other slopes are
    off by up to 0.4 % of 2 m_h ‖p‖ ‖p'‖, p from the middle.
    """

    unbounded = True

    def __init__(self, layout: Layout, distance: Literal["euclidean", "manhattan", "quadratic"] = "euclidean") -> None:
        super().__init__(layout)
        self.distance, self.slopes = distance, [slopes(layout.heads)]
        self.keeps_flash = distance == "quadratic"

    def logits(self, delta: Tensor) -> Tensor:
        return -constants(self.slopes, delta) * length(delta, self.distance)

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        if self.distance != "quadratic":
            return super().encode(coords, key_coords, grid)
        cells = self.layout.cell(coords)
        middle = cells.mean(dim=-2, keepdim=True).round()
        keys = cells if key_coords is None else self.layout.cell(key_coords)
        q, k = self.squares(cells - middle)[0], self.squares(keys - middle)[1]
        return Encoding(q=Transform(extra=[q]), k=Transform(extra=[k]))

    def squares(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Channels (B, H, N, A + 4) of queries, and of keys, whose products are -m_h ‖p - p'‖²."""
        places = (places[None] if places.ndim == 2 else places)[:, None]
        square, one = places.square().sum(dim=-1, keepdim=True), torch.ones_like(places[..., :1])
        coarse = square.bfloat16().to(square.dtype)  # and the rest: 8 bits each, for attention in half precision
        q = torch.cat((2 * places, -coarse, coarse - square, -one, -one), dim=-1)
        k = torch.cat((places, one, one, coarse, square - coarse), dim=-1)
        return constants(self.slopes, places[0]) * q, k


@register
class LookHere(Bias):
    """Heads that look one way each, and see the near better than the far (arXiv:2405.13985).

    A directed head sees keys within a cone of `fov` degrees, 180, 90 or 45, around its direction: one way along an
    axis, or, of 45 degrees, one of the eight that divide a plane of two axes. The last third of the heads sees all
    around. What is seen loses slope · s_l · m_h · ‖Δ‖, with s_l falling from the first layer to the last between the
    two `layer_slopes`; m_h is 1/2 for the first head of each direction, 1/4 for the next …, and 1/4, 1/16, 1/64, 1/256
    in turn for heads that see all around. A token always sees itself. Raises ValueError for 45 degrees on one axis.
    """

    unbounded = True

    def __init__(
        self,
        layout: Layout,
        fov: Literal[180, 90, 45] = 180,
        slope: float = 1.0,
        layer_slopes: tuple[float, ...] = (1.5, 0.5),
    ) -> None:
        super().__init__(layout)
        if fov == 45 and layout.axes == 1:
            raise ValueError("lookhere(fov=45) needs two axes or more, for along one there are two ways; use fov=180")
        if len(layer_slopes) != 2:
            raise ValueError(f"lookhere takes two layer_slopes, of the first and the last layer, got {layer_slopes}")
        ways, around = directions(layout.axes, fov), max(1, layout.heads // 3)
        directed = layout.heads - around
        looks = [ways[h % len(ways)] for h in range(directed)] + [(0.0,) * layout.axes] * around
        powers = [1 + h // len(ways) for h in range(directed)] + [2 * (h % 4 + 1) for h in range(around)]
        edge = math.cos(math.radians(fov / 2)) - 1e-4  # so that rounding hides nobody at the edge
        layers = torch.linspace(*layer_slopes, layout.depth, dtype=torch.float64, device="cpu").tolist()
        self.looks = list(zip(*looks, strict=True))  # (A, H)
        self.edges = [edge] * directed + [-1.0] * around  # (H,)
        self.slopes = [[slope * layer * 2.0**-power for power in powers] for layer in layers]  # (L, H)

    def logits(self, delta: Tensor) -> Tensor:
        far = delta.norm(dim=-1)
        ahead = sum(constants(look, delta) * delta[..., a] for a, look in enumerate(self.looks))
        hidden = ahead < constants(self.edges, delta) * far  # (H, …)
        return torch.where(hidden, HIDDEN, -constants(self.slopes, delta) * far)


def directions(axes: int, fov: int) -> list[tuple[float, ...]]:
    """Unit vectors (A,) in which heads look: both ways along each axis, or the eighths of each plane of two axes."""
    if fov > 45:
        return [tuple(way * (i == a) for i in range(axes)) for a in range(axes) for way in (-1.0, 1.0)]
    near, aside = math.cos(math.pi / 8), math.sin(math.pi / 8)
    return [
        tuple(way * (i == a) + turn * (i == b) for i in range(axes))
        for a, b in itertools.permutations(range(axes), 2)
        for way in (-near, near)
        for turn in (-aside, aside)
    ]
