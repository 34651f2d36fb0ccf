"""Biases from small networks of the displacement, for grids of any size.

Displacements Δ = key - query are in cells of the training grid.

Shapes   L layers, H heads, A axes, X displacements, Δ (…, A), logits (L, H, …)
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ..base import Layout
from ..encoding import Encoding
from ..specs import register
from .base import Bias, length


class LayerwiseMLP(nn.Module):
    """An MLP with one hidden layer for each of L layers.

    It maps (L or 1, X, I) to (L, X, O). The output has no bias, because a softmax would cancel it.
    """

    def __init__(self, layers: int, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"a network of positions needs a width of at least 1, got {width}")
        self.inward = nn.Parameter(torch.empty(layers, inputs, width))
        self.bias = nn.Parameter(torch.empty(layers, 1, width))
        self.outward = nn.Parameter(torch.empty(layers, width, outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights like `nn.Linear`."""
        for weight, fan in ((self.inward, self.inward), (self.bias, self.inward), (self.outward, self.outward)):
            nn.init.uniform_(weight, -(fan.shape[1] ** -0.5), fan.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (L or 1, X, I) to outputs (L, X, O), in the dtype of the inputs."""
        inward, bias, outward = (t.to(x.dtype) for t in (self.inward, self.bias, self.outward))
        return (x @ inward + bias).relu() @ outward


@register
class LogCPB(Bias):
    """A small network of log-spaced displacements for each layer, as in Swin v2 (arXiv:2111.09883).

    The bias is 16 · sigmoid(network(u)) with u_a = sign(Δ_a) · log2(1 + 8 |Δ_a| / (s_a - 1)) / 3 on
    a training grid of size s. The network has `width` hidden channels. Swin v2 and timm's
    `RelPosMlp` define Δ = query - key; to convert them, negate the weights of the first layer.
    """

    unbounded = True
    costly = True

    def __init__(self, layout: Layout, width: int = 512) -> None:
        super().__init__(layout)
        self.network = LayerwiseMLP(layout.depth, layout.axes, width, layout.heads)

    def logits(self, delta: Tensor) -> Tensor:
        max_distance = torch.tensor([max(n - 1, 1) for n in self.layout.grid], device=delta.device)
        inputs = delta.sign() * torch.log2(1 + 8 * delta.abs() / max_distance) / 3
        values = 16 * self.network(inputs.view(1, -1, inputs.shape[-1])).sigmoid()
        return values.transpose(1, 2).unflatten(-1, delta.shape[:-1])


@register
class FIRE(Bias):
    """A small network of the log distance relative to the extent of the grid (arXiv:2310.04418).

    The bias is network(ln(1 + c ‖Δ‖) / ln(1 + c R)) for each layer, with `width` hidden channels
    and a learned c. R is the longest distance on the grid of the tokens, or on the training grid if
    that is larger or no grid is given. So larger grids are compressed to the range of inputs seen
    in training.
    """

    unbounded = True
    costly = True

    def __init__(
        self, layout: Layout, width: int = 32, distance: Literal["euclidean", "manhattan"] = "euclidean"
    ) -> None:
        super().__init__(layout)
        self.distance = distance
        self.network = LayerwiseMLP(layout.depth, 1, width, layout.heads)
        self.rates = nn.Parameter(torch.empty(layout.depth))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.rates, 0.1)

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        sizes = self.layout.grid if grid is None else grid
        longest = [self.max_distance(shape, coords) for shape in (sizes, self.layout.grid)]
        logits = partial(self.logits, max_distance=torch.maximum(*longest))
        return self.bias_encoding(logits, coords, key_coords, grid)

    def max_distance(self, grid: Sequence[int], coords: Tensor) -> Tensor:
        """Return the longest distance () on a grid, at least 1, with the dtype of `coords`."""
        cells = self.layout.cell(self.layout.coords(grid, coords.device).to(coords.dtype))
        return length(cells[-1] - cells[0], self.distance).clamp(min=1)

    def logits(self, delta: Tensor, max_distance: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        rates = self.rates.abs().to(delta.dtype)[:, None]  # (L, 1)
        distance = length(delta, self.distance)
        relative = torch.log1p(rates * distance.flatten()) / torch.log1p(rates * max_distance)
        return self.network(relative[..., None]).transpose(1, 2).unflatten(-1, distance.shape)
