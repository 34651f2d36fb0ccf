"""Learned absolute positions: a vector for each cell, joined with the tokens.

Shapes   B samples, N tokens, A axes, C channels of a token; tables (*grid, C)
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.eager import accumulation_dtype
from ..base import Layout, Position
from ..grids import interpolate, is_full_grid, resample, sum_over_axes
from ..specs import register
from .base import Absolute


@register
class Learned(Absolute):
    """A learned vector for every cell of the training grid (arXiv:2010.11929).

    For a different grid the table is resampled: bicubic and antialiased for images, linear
    otherwise. At coordinates that are not a full grid it is interpolated linearly between cells,
    and beyond the border it has the values of the border. The table of a checkpoint with a
    different grid is resampled when it is loaded.
    """

    unbounded = False

    def __init__(self, layout: Layout, std: float = 0.02) -> None:
        super().__init__()
        if std < 0:
            raise ValueError(f"learned needs a standard deviation of 0 or more, got {std}")
        self.layout, self.std = layout, std
        self.table = nn.Parameter(torch.empty(*layout.grid, layout.width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.table, std=self.std)

    def vectors(self, coords: Tensor, grid: Sequence[int] | None, layer: int) -> Tensor:
        table = self.table.to(accumulation_dtype(self.table))
        table = table if grid is None else resample(table, grid)
        return (
            table.flatten(0, -2) if is_full_grid(coords, grid) else interpolate(table, self.layout.cell(coords, grid))
        )

    def fit(self, stored: Tensor) -> Tensor:
        """Return a stored table, resampled to the grid of this scheme if its own grid differs."""
        shape = self.table.shape
        if stored.shape == shape or stored.ndim != len(shape) or stored.shape[-1] != shape[-1]:
            return stored
        return resample(stored.float(), self.layout.grid).to(stored.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        key = f"{prefix}table"
        if key in state_dict:
            state_dict[key] = self.fit(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@register
class Hierarchical(Absolute):
    """A learned table that extends beyond its end, and to several axes.


    Su (https://kexue.fm/archives/7947) splits position k = i m + j of a table of m rows into two
    digits, i and j: p_k = alpha u_i + (1 - alpha) u_j. The first m positions are the table itself,
    so u = (p - alpha p_0) / (1 - alpha), and an axis of n cells extends to n² cells.

    Over two axes the same sum is e[y, x] = alpha u_y + (1 - alpha) u_x, of one shared table. With
    alpha = 1/2 it could not distinguish (y, x) from (x, y), so Su uses 0.4. Flattened text has a
    slow and a fast digit, but images have no such axes: a step down would count alpha / (1 - alpha)
    = 2/3 of a step to the right. With `tables="axes"` each axis has its own table and the same
    weight, 1/2 on images, and alpha is used beyond the tables only.

    Raises ValueError for an alpha outside (0, 1), or one that gives two positions the same vector.
    """

    unbounded = False  # limited to n² cells

    def __init__(
        self, layout: Layout, alpha: float = 0.4, tables: Literal["shared", "axes"] = "shared", std: float = 0.02
    ) -> None:
        super().__init__()
        axes, shared = layout.axes, tables == "shared"
        if not 0 < alpha < 1 or std < 0:
            raise ValueError(f"hierarchical needs an alpha between 0 and 1 and a std of 0 or more, got {alpha}, {std}")
        steps = [alpha ** (axes - 1 - a) * (1 if a == 0 else 1 - alpha) for a in range(axes)]
        sums = {round(sum(chosen), 9) for chosen in product(*((0.0, step) for step in steps))}
        if alpha == 0.5 or (shared and len(sums) < 2**axes):
            remedy = "use a different alpha, such as 0.4" + (', or tables="axes" with it' if axes > 1 else "")
            raise ValueError(f"hierarchical cannot distinguish digits with alpha {alpha}; {remedy}")
        self.layout, self.alpha, self.std = layout, alpha, std
        self.weights = steps if shared else [1 / axes] * axes
        self.sizes = [max(layout.grid)] if shared else list(layout.grid)
        self.table = nn.Parameter(torch.empty(sum(self.sizes), layout.width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.table, std=self.std)

    def vectors(self, coords: Tensor, grid: Sequence[int] | None, layer: int) -> Tensor:
        tables = self.table.to(coords.dtype).split(self.sizes) * (len(self.weights) // len(self.sizes))

        def vectors_along(axis: int, cells: Tensor) -> Tensor:
            low = cells.floor()
            first, second = (self.digits(tables[axis], low + step) for step in (0, 1))
            return self.weights[axis] * torch.lerp(first, second, (cells - low)[..., None])

        return sum_over_axes(vectors_along, self.layout.cell(coords, grid), grid)

    def digits(self, table: Tensor, cells: Tensor) -> Tensor:
        """Return rows (…, C) at integer cells (…) of a table (n, C) that extends to n² cells."""
        n = len(table)
        cells = cells.long().clamp(0, n * n - 1)
        units = (table - self.alpha * table[0]) / (1 - self.alpha)
        return self.alpha * units[cells // n] + (1 - self.alpha) * units[cells % n]


@register
class Multiplicative(Learned):
    """A learned vector p for every cell, near 0 at first, that multiplies tokens: x ⊙ (1 + p).

    p is a table like that of `learned`, resampled and interpolated in the same way.
    """

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        return x * (1 + self.embedding(coords, grid, layer)).to(x.dtype)


@register
class Concat(Position):
    """Tokens and learned vectors p of `channels`, concatenated and projected: W [x; p].

    This equals W_x x + W_p p, so it is a sum again, with a smaller table. W_x is initialized as the
    identity. Raises ValueError for fewer than 1 channel.
    """

    relative, reversible, unbounded = False, True, False

    def __init__(self, layout: Layout, channels: int = 64) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"concat needs at least 1 channel, got {channels}")
        self.table = Learned(replace(layout, width=channels, heads=1))
        self.weight = nn.Parameter(torch.empty(layout.width, layout.width + channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.normal_(std=(self.weight.shape[1] - self.weight.shape[0]) ** -0.5)
            self.weight[:, : len(self.weight)] = torch.eye(len(self.weight), device=self.weight.device)

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        vectors = self.table.embedding(coords, grid, layer).to(x.dtype).expand(*x.shape[:-1], -1)
        return F.linear(torch.cat((x, vectors), dim=-1), self.weight.to(x.dtype)).to(x.dtype)
