"""Absolute positions: what is added to the tokens themselves, before the first layer; and nothing, to compare with."""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from .base import Encoding, Layout, Position, no_autocast
from .specs import register


@torch.fx.wrap
@torch.jit.ignore
def learned_vectors(table: Tensor, coords: Tensor, grid: Sequence[int] | None, layout: Layout) -> Tensor:
    """Vectors (…, C) of a table (*layout.grid, C): resampled to a whole grid, else read at coordinates (…, A)."""
    table = table.float() if grid is None else resample(table.float(), grid)
    if grid is not None and coords.ndim == 2 and coords.shape[0] == math.prod(grid):
        return table.flatten(0, -2)
    return read(table, layout.cell(coords.float(), grid))


def resample(table: Tensor, grid: Sequence[int]) -> Tensor:
    """A table (*sizes, C) resampled to (*grid, C): bicubic and antialiased on images, linear on 1 or 3 axes."""
    if _same(table.shape[:-1], grid):
        return table
    mode = {1: "linear", 2: "bicubic", 3: "trilinear"}.get(table.ndim - 1)
    if mode is None:
        raise ValueError(f"a learned table can be resampled on 1, 2 or 3 axes, not on {table.ndim - 1}")
    image = table.movedim(-1, 0)[None]
    image = nn.functional.interpolate(image, tuple(grid), mode=mode, antialias=mode == "bicubic", align_corners=False)
    return image[0].movedim(0, -1)


def _same(sizes: Sequence[int], grid: Sequence[int]) -> bool:
    """Whether a table has the grid's shape already; a compiled graph for all shapes must not ask, and resamples."""
    if not torch.compiler.is_compiling():
        return tuple(sizes) == tuple(grid)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return all(statically_known_true(n == m) for n, m in zip(sizes, grid, strict=True))


def read(table: Tensor, cells: Tensor) -> Tensor:
    """Vectors (…, C) of a table (*sizes, C) at fractional cells (…, A), linear between the cells around each."""
    sizes = table.shape[:-1]
    cells = torch.stack([cells[..., a].clamp(0, n - 1) for a, n in enumerate(sizes)], dim=-1)
    low = cells.floor()
    part = cells - low
    total = torch.zeros(1, device=table.device)
    for corner in product((0, 1), repeat=len(sizes)):
        steps = torch.tensor(corner, device=cells.device)
        weight = torch.where(steps == 1, part, 1 - part).prod(dim=-1, keepdim=True)
        at = (low.long() + steps).unbind(-1)
        total = total + table[tuple(i.clamp(max=n - 1) for i, n in zip(at, sizes, strict=True))] * weight
    return total


@torch.fx.wrap
@torch.jit.ignore
def sincos_vectors(coords: Tensor, grid: Sequence[int] | None, layout: Layout, base: float, flattened: bool) -> Tensor:
    """Sines and cosines (…, C) at coordinates (…, A): for each axis its sines, then its cosines, then zeros."""
    with no_autocast(coords.device):
        coords = layout.flatten(coords.float(), grid) if flattened else coords.float()
        count = layout.width // (2 * coords.shape[-1])
        speeds = base ** (-torch.arange(count, dtype=torch.float32, device=coords.device) / count)
        theta = coords[..., None] * speeds
        vectors = torch.stack((theta.sin(), theta.cos()), dim=-2).flatten(-3)
        return nn.functional.pad(vectors, (0, layout.width - vectors.shape[-1]))


@register
class Learned(Position):
    """A learned vector for every cell of the training grid (arXiv:2010.11929).

    On another grid the table is resampled, bicubic and antialiased on images and linear on 1 or 3 axes; at coordinates
    that are no whole grid it is read by linear interpolation between cells, and beyond the border it goes on as at the
    border. A checkpoint of another grid is resampled when it is loaded.
    """

    relative = False

    def __init__(self, layout: Layout, std: float = 0.02) -> None:
        super().__init__()
        if std < 0:
            raise ValueError(f"learned needs a standard deviation of 0 or more, got {std}")
        self.layout, self.std = layout, std
        self.table = nn.Parameter(torch.empty(*layout.grid, layout.width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.table, std=self.std)

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        return x + learned_vectors(self.table, coords, grid, self.layout).to(x.dtype)

    def fit(self, stored: Tensor) -> Tensor:
        """A stored table as this grid needs it, resampled if it is one of another grid."""
        mine = self.table.shape
        if stored.shape == mine or stored.ndim != len(mine) or stored.shape[-1] != mine[-1]:
            return stored
        return resample(stored.float(), self.layout.grid).to(stored.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        key = f"{prefix}table"
        if key in state_dict:
            state_dict[key] = self.fit(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@register
class SinCos(Position):
    """Fixed sines and cosines of the coordinates (arXiv:1706.03762), an equal share of the channels for each axis.

    An axis with P frequencies base^(-j/P) fills P sines, then P cosines: rows first, as in MAE (arXiv:2111.06377);
    channels that do not divide stay zero, at the end. With axes=1 the one axis is the flattened grid.
    """

    relative = False

    def __init__(self, layout: Layout, base: float = 10000.0, axes: int | None = None) -> None:
        super().__init__()
        if axes not in (None, 1, layout.axes):
            raise ValueError(f"sincos(axes=…) is 1 or the grid's own number of axes, {layout.axes}, got {axes}")
        if base <= 0:
            raise ValueError(f"sincos needs a positive base, got {base}")
        self.layout, self.base, self.flattened = layout, base, axes == 1
        if layout.width < 2 * (1 if self.flattened else layout.axes):
            raise ValueError(f"width {layout.width} is too small for sines and cosines of {layout.axes} axes")

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        return x + sincos_vectors(coords, grid, self.layout, self.base, self.flattened).to(x.dtype)


@register
def none(layout: Layout) -> Position:
    """No positions at all: the honest baseline, for which tokens form a set."""
    return Position()


@register
class Gate(Position):
    """A scheme whose addition to the tokens counts as much as one number says: all at 1, nothing at 0.

    The number is learned from `start`, or set from outside, as `training.callbacks.Fade` does to wean a trained model
    off its table. What the scheme does in attention stays whole.
    """

    relative = False

    def __init__(self, layout: Layout, scheme: Position, start: float = 1.0) -> None:
        super().__init__()
        self.scheme, self.start = scheme, start
        for claim in ("reversible", "keeps_flash", "extrapolates", "each_layer"):
            setattr(self, claim, getattr(scheme, claim))
        self.gate = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gate, self.start)

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        return torch.lerp(x, self.scheme.add(x, coords, grid, layer), self.gate.to(x.dtype))  # exact at 0 and at 1

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        return self.scheme.encode(coords, key_coords, grid)
