"""Absolute positions: vectors of places, added to the tokens before the first layer; and nothing, to compare with."""

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .base import Encoding, Layout, Position, no_autocast
from .specs import register


class Absolute(Position):
    """A scheme that gives every place a vector, which is added to the token there."""

    relative = False
    reversible = True

    def vectors(self, coords: Tensor, grid: Sequence[int] | None, layer: int) -> Tensor:
        """Vectors (N, C) or (B, N, C) of coordinates (N, A) or (B, N, A), at least as precise as those."""
        raise NotImplementedError(f"{type(self).__name__} needs vectors()")

    def places(self, coords: Tensor, grid: Sequence[int] | None, layer: int) -> Tensor:
        """The vectors, which autocast does not round."""
        with no_autocast(coords.device):
            return self.vectors(coords, grid, layer)

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        return x + self.places(coords, grid, layer).to(x.dtype)


def is_whole(coords: Tensor, grid: Sequence[int] | None) -> bool:
    """Whether coordinates are those of all cells of their grid, in order."""
    return grid is not None and coords.ndim == 2 and coords.shape[0] == math.prod(grid)


def summed(along: Callable[[int, Tensor], Tensor], coords: Tensor, grid: Sequence[int] | None) -> Tensor:
    """The sum over the axes of `along(axis, places)` (…, C), asked once for each row and column of a whole grid."""
    axes = range(coords.shape[-1])
    if grid is None or not is_whole(coords, grid):
        return torch.stack([along(a, coords[..., a]) for a in axes]).sum(dim=0)
    lines, total = coords.view(*grid, len(axes)), torch.zeros(1, device=coords.device)
    for a in axes:
        vectors = along(a, lines[tuple(slice(None) if i == a else 0 for i in axes)][:, a])
        total = total + vectors.view(*(grid[a] if i == a else 1 for i in axes), -1)
    return total.flatten(0, -2)


def resample(table: Tensor, grid: Sequence[int]) -> Tensor:
    """A table (*sizes, C) resampled to (*grid, C): bicubic and antialiased on images, else linear along each axis."""
    if _same(table.shape[:-1], grid):
        return table
    if len(grid) == 2:
        image = table.movedim(-1, 0)[None]
        image = nn.functional.interpolate(image, tuple(grid), mode="bicubic", antialias=True, align_corners=False)
        return image[0].movedim(0, -1)
    for axis, size in enumerate(grid):  # linear along one axis after another is linear along all
        lines = table.movedim(axis, -1)
        line = nn.functional.interpolate(lines.flatten(0, -2)[None], size, mode="linear", align_corners=False)[0]
        table = line.view(*lines.shape[:-1], size).movedim(-1, axis)
    return table


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


@register
class Learned(Absolute):
    """A learned vector for every cell of the training grid (arXiv:2010.11929).

    On another grid the table is resampled, bicubic and antialiased on images and linear elsewhere; at coordinates
    that are no whole grid it is read by linear interpolation between cells, and beyond the border it goes on as at the
    border. A checkpoint of another grid is resampled when it is loaded.
    """

    extrapolates = False

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
        table = self.table.float() if grid is None else resample(self.table.float(), grid)
        return table.flatten(0, -2) if is_whole(coords, grid) else read(table, self.layout.cell(coords, grid))

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
class SinCos(Absolute):
    """Fixed sines and cosines of the coordinates (arXiv:1706.03762), an equal share of the channels for each axis.

    An axis with P frequencies base^(-j/P) fills P sines, then P cosines: rows first, as in MAE (arXiv:2111.06377);
    channels that do not divide stay zero, at the end. With axes=1 the one axis is the flattened grid.
    """

    def __init__(self, layout: Layout, base: float = 10000.0, axes: int | None = None) -> None:
        super().__init__()
        if axes not in (None, 1, layout.axes):
            raise ValueError(f"sincos(axes=…) is 1 or the grid's own number of axes, {layout.axes}, got {axes}")
        if base <= 0:
            raise ValueError(f"sincos needs a positive base, got {base}")
        self.layout, self.base, self.flattened = layout, base, axes == 1
        if layout.width < 2 * (1 if self.flattened else layout.axes):
            raise ValueError(f"width {layout.width} is too small for sines and cosines of {layout.axes} axes")

    def vectors(self, coords: Tensor, grid: Sequence[int] | None, layer: int) -> Tensor:
        coords = self.layout.flatten(coords, grid) if self.flattened else coords
        count = self.layout.width // (2 * coords.shape[-1])
        speeds = self.base ** (-torch.arange(count, dtype=coords.dtype, device=coords.device) / count)
        theta = coords[..., None] * speeds
        vectors = torch.stack((theta.sin(), theta.cos()), dim=-2).flatten(-3)
        return nn.functional.pad(vectors, (0, self.layout.width - vectors.shape[-1]))


@register
class Hierarchical(Absolute):
    """A learned table for one axis, which serves several and goes on beyond its end (Su, https://kexue.fm/archives/7947).

    Su splits place k = i m + j of a table of m rows into digits, p_k = alpha u_i + (1 - alpha) u_j with the table as
    its first m rows: u = (p - alpha p_0) / (1 - alpha). So each axis of n cells goes on to n² of them. Over axes the
    same sum is e[y, x] = alpha u_y + (1 - alpha) u_x, of one shared table; with alpha = 1/2 that could not tell (y, x)
    from (x, y), so Su takes 0.4. A flattened text has a slow and a fast digit, but images have no such axes: a step
    down would count alpha / (1 - alpha) = 2/3 of one to the right. `tables="axes"` is the honest form there: each axis
    has a table of its own and equal weight, 1/2 on images, and alpha serves what lies beyond the tables alone.

    Raises ValueError for an alpha outside (0, 1), or one with which two places look the same.
    """

    extrapolates = False  # but to n² cells

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
            remedy = 'take another, such as 0.4, or tables="axes" with one' if axes > 1 else "take another, such as 0.4"
            raise ValueError(f"hierarchical cannot tell digits apart with alpha {alpha}; {remedy}")
        self.layout, self.alpha, self.std = layout, alpha, std
        self.weights = steps if shared else [1 / axes] * axes
        self.sizes = [max(layout.grid)] if shared else list(layout.grid)
        self.table = nn.Parameter(torch.empty(sum(self.sizes), layout.width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.table, std=self.std)

    def vectors(self, coords: Tensor, grid: Sequence[int] | None, layer: int) -> Tensor:
        tables = self.table.to(coords.dtype).split(self.sizes) * (len(self.weights) // len(self.sizes))

        def along(axis: int, cells: Tensor) -> Tensor:
            low = cells.floor()
            first, second = (self.digits(tables[axis], low + step) for step in (0, 1))
            return self.weights[axis] * torch.lerp(first, second, (cells - low)[..., None])

        return summed(along, self.layout.cell(coords, grid), grid)

    def digits(self, table: Tensor, cells: Tensor) -> Tensor:
        """Rows (…, C) at whole cells (…) of a table (n, C) that goes on to n² cells."""
        n = len(table)
        cells = cells.long().clamp(0, n * n - 1)
        units = (table - self.alpha * table[0]) / (1 - self.alpha)
        return self.alpha * units[cells // n] + (1 - self.alpha) * units[cells % n]


@register
def none(layout: Layout) -> Position:
    """No positions at all: the honest baseline, for which tokens form a set."""
    return Position()


@register
class Gate(Position):
    """A scheme whose addition to the tokens counts as much as one number says: all at 1, nothing at 0.

    The number is learned from `start`, or set from outside, as `training.Fade` does to wean a trained model
    off its table. What the scheme does in attention stays whole.
    """

    def __init__(self, layout: Layout, scheme: Position, start: float = 1.0) -> None:
        super().__init__()
        self.scheme, self.start = scheme, start
        for claim in ("relative", "reversible", "keeps_flash", "extrapolates", "each_layer"):
            setattr(self, claim, getattr(scheme, claim))
        self.gate = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gate, self.start)

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        return torch.lerp(x, self.scheme.add(x, coords, grid, layer), self.gate.to(x.dtype))  # exact at 0 and at 1

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        return self.scheme.encode(coords, key_coords, grid)
