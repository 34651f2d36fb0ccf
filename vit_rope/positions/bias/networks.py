"""TODO positions.bias.networks from ['positions.learnedbias']."""

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
    """A network of one hidden layer for each of L: inputs (L or 1, X, I) to outputs (L, X, O), without a bias there,
    which a softmax would not see."""

    def __init__(self, layers: int, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"a network of positions needs a width of at least 1, got {width}")
        self.inward = nn.Parameter(torch.empty(layers, inputs, width))
        self.bias = nn.Parameter(torch.empty(layers, 1, width))
        self.outward = nn.Parameter(torch.empty(layers, width, outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights as `nn.Linear` does."""
        for weight, fan in ((self.inward, self.inward), (self.bias, self.inward), (self.outward, self.outward)):
            nn.init.uniform_(weight, -(fan.shape[1] ** -0.5), fan.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        inward, bias, outward = (t.to(x.dtype) for t in (self.inward, self.bias, self.outward))
        return (x @ inward + bias).relu() @ outward


@register
class LogCPB(Bias):
    """A small network of the logarithms of the displacement, for each layer: Swin v2's (arXiv:2111.09883).

    16 · sigmoid(network(u)), u_a = sign(Δ_a) · log2(1 + 8 |Δ_a| / (s_a - 1)) / 3 on a training grid of size s, with
    `width` hidden channels. Swin v2 and timm's `RelPosMlp` count Δ = query - key: negate the first layer's weights.
    """

    unbounded = True
    costly = True

    def __init__(self, layout: Layout, width: int = 512) -> None:
        super().__init__(layout)
        self.network = LayerwiseMLP(layout.depth, layout.axes, width, layout.heads)

    def logits(self, delta: Tensor) -> Tensor:
        reach = torch.tensor([max(n - 1, 1) for n in self.layout.grid], device=delta.device)
        inputs = delta.sign() * torch.log2(1 + 8 * delta.abs() / reach) / 3
        values = 16 * self.network(inputs.view(1, -1, inputs.shape[-1])).sigmoid()
        return values.transpose(1, 2).unflatten(-1, delta.shape[:-1])


@register
class FIRE(Bias):
    """A small network of the logarithm of the distance relative to the grid's, for each layer (arXiv:2310.04418).

    network(ln(1 + c ‖Δ‖) / ln(1 + c R)), with `width` hidden channels and a learned c. R is the longest displacement of
    the grid that the tokens come from, or of the training grid if that is larger or there is no grid: larger grids are
    squeezed into the distances that training has seen.
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
        logits = partial(
            self.logits, reach=torch.maximum(self.reach(sizes, coords), self.reach(self.layout.grid, coords))
        )
        return self.placed(logits, coords, key_coords, grid)

    def reach(self, grid: Sequence[int], like: Tensor) -> Tensor:
        """The longest displacement () on a grid, or 1 if that is longer."""
        ends = self.layout.cell(self.layout.coords(grid, like.device).to(like.dtype))
        return length(ends[-1] - ends[0], self.distance).clamp(min=1)

    def logits(self, delta: Tensor, reach: Tensor) -> Tensor:  # pyrefly: ignore[bad-override]
        rates = self.rates.abs().to(delta.dtype)[:, None]  # (L, 1)
        far = length(delta, self.distance)
        relative = torch.log1p(rates * far.flatten()) / torch.log1p(rates * reach)
        return self.network(relative[..., None]).transpose(1, 2).unflatten(-1, far.shape)
