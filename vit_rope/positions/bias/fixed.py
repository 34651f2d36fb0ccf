"""Fixed biases of the displacement: penalties that grow with distance, and directions of view.

Displacements Δ = key - query are in cells of the training grid.

Shapes   B samples, L layers (1 if shared), H heads, N tokens, A axes, Δ (…, A), logits (L, H, …)
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

# Like -inf after a softmax, but without NaN if all keys are hidden. Fits float16.
HIDDEN = -1e4

# The unit of channels with squares: float16 then holds them up to 4,095 cells from the center.
SQUARES = 256.0


def slopes(heads: int) -> list[float]:
    """Return the slopes of ALiBi, 2^(-8h/H) for h = 1 … H (arXiv:2108.12409).

    If H is not a power of two, these are the slopes of the next smaller power of two, followed by
    every other slope of the next larger one.
    """
    below = 2 ** int(math.log2(heads))
    powers = [8 * h / below for h in range(1, below + 1)] + [4 * h / below for h in range(1, 2 * below, 2)]
    return [2.0**-power for power in powers[:heads]]


@register
class ALiBi(Bias):
    """A penalty -m_h ‖Δ‖ on distance, with a slope m_h for each head (arXiv:2108.12409).

    `distance` is "euclidean" (2-D ALiBi of CROMA, arXiv:2311.00566), "manhattan", or "quadratic".
    The quadratic penalty -m_h ‖Δ‖² needs no mask and keeps flash attention, because ‖Δ‖² is an
    inner product of A + 4 extra channels of queries and keys. They are computed from coordinates
    relative to the center. In bfloat16 these channels and their products are exact for integer
    cells within 256 of the center and slopes that are powers of two, as with 1, 2, 3, 4, 6 or 8
    heads. With other slopes the error is up to 0.4 % of 2 m_h ‖p‖ ‖p'‖, with p relative to the
    center. In float16 they are finite within 4,095 cells of the center.
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
        center = cells.mean(dim=-2, keepdim=True).round()
        keys = cells if key_coords is None else self.layout.cell(key_coords)
        q, k = self.squares(cells - center)[0], self.squares(keys - center)[1]
        return Encoding(q=Transform(extra=[q]), k=Transform(extra=[k]))

    def squares(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Return channels (B, H, N, A + 4) of queries and of keys with products -m_h ‖p - p'‖²."""
        points = (points[None] if points.ndim == 2 else points)[:, None]
        square, one = points.square().sum(dim=-1, keepdim=True), torch.ones_like(points[..., :1])
        coarse = square.bfloat16().to(square.dtype)  # 8 bits of the square; the rest goes to a channel of its own
        rest, unit = (square - coarse) / SQUARES, SQUARES * one
        coarse = coarse / SQUARES
        q = torch.cat((2 * points, -coarse, -rest, -unit, -unit), dim=-1)
        k = torch.cat((points, unit, unit, coarse, rest), dim=-1)
        return constants(self.slopes, points[0]) * q, k


@register
class LookHere(Bias):
    """Heads that each look in one direction, with a penalty on distance (arXiv:2405.13985).

    A directed head attends to keys within a cone of `fov` degrees (180, 90 or 45) around its
    direction. Directions are both ways along each axis; for 45 degrees they are the eight that
    divide each plane of two axes. The last third of the heads is not directed. A token always
    attends to itself.

    The penalty is slope · s_l · m_h · ‖Δ‖. s_l is linear between the two `layer_slopes`, from the
    first layer to the last. m_h is 1/2 for the first head of each direction, 1/4 for the second and
    so on, and cycles through 1/4, 1/16, 1/64, 1/256 for heads that are not directed.

    Raises ValueError for 45 degrees on one axis.
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
            raise ValueError(
                "lookhere(fov=45) needs two axes or more, because one axis has only two directions; use fov=180"
            )
        if len(layer_slopes) != 2:
            raise ValueError(f"lookhere needs two layer_slopes, of the first and the last layer, got {layer_slopes}")
        views, undirected = view_directions(layout.axes, fov), max(1, layout.heads // 3)
        directed = layout.heads - undirected
        directions = [views[h % len(views)] for h in range(directed)] + [(0.0,) * layout.axes] * undirected
        powers = [1 + h // len(views) for h in range(directed)] + [2 * (h % 4 + 1) for h in range(undirected)]
        edge = math.cos(math.radians(fov / 2)) - 1e-4  # so that rounding hides no key at the edge
        layers = torch.linspace(*layer_slopes, layout.depth, dtype=torch.float64, device="cpu").tolist()
        self.directions = list(zip(*directions, strict=True))  # (A, H)
        self.edges = [edge] * directed + [-1.0] * undirected  # (H,)
        self.slopes = [[slope * layer * 2.0**-power for power in powers] for layer in layers]  # (L, H)

    def logits(self, delta: Tensor) -> Tensor:
        distance = delta.norm(dim=-1)
        ahead = sum(constants(direction, delta) * delta[..., a] for a, direction in enumerate(self.directions))
        hidden = ahead < constants(self.edges, delta) * distance  # (H, …)
        return torch.where(hidden, HIDDEN, -constants(self.slopes, delta) * distance)


def view_directions(axes: int, fov: int) -> list[tuple[float, ...]]:
    """Return unit vectors (A,): two along each axis, or for 45 degrees eight in each plane."""
    if fov > 45:
        return [tuple(sign * (i == a) for i in range(axes)) for a in range(axes) for sign in (-1.0, 1.0)]
    cos, sin = math.cos(math.pi / 8), math.sin(math.pi / 8)
    return [
        tuple(first * (i == a) + second * (i == b) for i in range(axes))
        for a, b in itertools.permutations(range(axes), 2)
        for first in (-cos, cos)
        for second in (-sin, sin)
    ]
