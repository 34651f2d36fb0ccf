"""What a position scheme is.

A position scheme is a function of coordinates. Attention asks it what to do and never asks which scheme it is.

A scheme may do two things. `encode` turns coordinates into an `Encoding`, once per forward pass: plain tensors that say
how attention rotates queries and keys and what it adds to their logits. `add` acts earlier, on the tokens themselves,
for absolute schemes. The base classes do nothing, so a scheme overrides only what it means.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.fx
from torch import Tensor, nn

from . import coords as places
from .encoding import Encoding, after, combine


@dataclass(frozen=True)
class Layout:
    """All that a scheme may know of its model.

    `width` channels in `heads` heads, `grid` cells along each axis in training, `depth` layers; coordinates come in
    `unit` and from `origin` as `coords.grid` defines them. Raises ValueError where width does not divide by heads.
    """

    width: int
    heads: int
    grid: tuple[int, ...]
    depth: int = 12
    unit: str = "index"
    origin: float | str | tuple[float, ...] = field(default=0.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        places.check_shape(self.grid)
        places.check_unit(self.unit)
        for name in ("width", "heads", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"a layout needs a {name} of at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide by {self.heads} heads")

    @property
    def axes(self) -> int:
        return len(self.grid)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def coords(self, shape: Sequence[int] | None = None, device: torch.device | None = None) -> Tensor:
        """Coordinates (N, A) of a grid of this shape, or of the training grid, in this layout's unit and origin."""
        return places.grid(self.grid if shape is None else shape, self.unit, self.origin, device)

    def cell(self, coords: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Cell indices (…, A), fractional between cells, of coordinates (…, A) on this or on the training grid."""
        return places.cell(coords, self.grid if grid is None else grid, self.unit, self.origin)

    def flatten(self, coords: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Row-major cell numbers (…, 1) of coordinates (…, A) on this or on the training grid."""
        sizes, cells = self.grid if grid is None else grid, self.cell(coords, grid)
        number = cells[..., :1]
        for a in range(1, len(sizes)):
            number = number * sizes[a] + cells[..., a : a + 1]
        return number


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Switch autocast off, which would round positions; the meta device knows none."""
    if device.type == "meta" or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type)):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class Position(nn.Module):
    """A position scheme; this base is `none`, for which tokens form a set.

    What it learns stays in float32 (or float64) under `.bfloat16()` and `.half()`.
    """

    # claims that tests hold every scheme to
    relative: bool = True  # logits depend on displacements alone
    reversible: bool = False  # on the training grid no two places look the same
    keeps_flash: bool = True  # attention needs no mask
    unbounded: bool = True  # every coordinate has a place of its own, also beyond the training grid

    each_layer: bool = False  # whether `add` acts again before the layers after the first
    axes: int | None = None  # how many axes coordinates must have; None takes any
    made_for: Layout | None = None  # the layout that `build` made it for
    spec: str = ""  # the spec that `build` made it from

    @property
    def learned(self) -> bool:
        """Whether training changes the scheme."""
        return any(True for _ in self.parameters())

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        """The encoding of tokens at `coords` (N, A) or (B, N, A), and keys at `key_coords` where they are elsewhere.

        `grid`, where given, is the grid that the tokens come from.
        """
        return Encoding()

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        """Patch tokens x (B, N, C) with their absolute places in them, unchanged where the scheme has none.

        Called before the first layer, and before each `layer` after it where the scheme says `each_layer`.
        """
        return x

    def reset_parameters(self) -> None:
        """Draw the scheme's own parameters anew."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Position":
        def keep_precision(tensor: Tensor) -> Tensor:  # bfloat16 frequencies are off by a radian at 256 cells
            moved = fn(tensor)
            return moved if moved.dtype in (torch.float32, torch.float64) else tensor.to(moved.device)

        return super()._apply(keep_precision, recurse)

    def forward(
        self,
        coords: Tensor,
        prefix: int = 0,
        key_coords: Tensor | None = None,
        key_prefix: int | None = None,
        grid: list[int] | None = None,
    ) -> Encoding:
        """Encode tokens at `coords` (N, A) or (B, N, A) that follow `prefix` tokens without a place.

        Keys are the same tokens unless `key_coords` (and `key_prefix`) say otherwise. `grid` says what grid the tokens
        come from, if any; coords (N, A) with one row for each of its cells must then be all of it, in row-major order,
        an axis at a time as `coords.grid` makes them (shifted or stretched, but not cell by cell).
        Raises TypeError or ValueError for coordinates of another type or number of axes.
        """
        coords = self._check(coords, grid)
        if key_coords is not None:
            key_coords = places.check_coords(key_coords, self.axes)
        with no_autocast(coords.device):
            encoding = self.encode(coords, key_coords, grid)
        return after(encoding, prefix, prefix if key_prefix is None else key_prefix)

    def embed(self, x: Tensor, coords: Tensor, grid: list[int] | None = None, layer: int = 0) -> Tensor:
        """Patch tokens x (B, N, C) with their absolute places in them, for `coords` and `grid` as in a call."""
        return self.add(x, self._check(coords, grid), grid, layer)

    def _check(self, coords: Tensor, grid: Sequence[int] | None) -> Tensor:
        return places.check_coords(coords, self.axes, finite=None if grid is None else False)  # a grid's are sound


class Sum(Position):
    """Several schemes at once, e.g. a rotation over a learned table: turns compose, biases and embeddings add."""

    def __init__(self, *parts: Position) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.relative = all(part.relative for part in parts)
        self.reversible = any(part.reversible for part in parts)
        self.keeps_flash = all(part.keeps_flash for part in parts)
        self.unbounded = all(part.unbounded for part in parts)
        self.each_layer = any(part.each_layer for part in parts)

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        for part in self.parts:
            if layer == 0 or part.each_layer:
                x = cast(Position, part).add(x, coords, grid, layer)
        return x

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        encodings = (cast(Position, part).encode(coords, key_coords, grid) for part in self.parts)
        return functools.reduce(combine, encodings, Encoding())


def check_pairs(name: str, channels: int, axes: int) -> int:
    """How many pairs of channels each axis gets; ValueError where it is none."""
    if channels < 2 * axes:
        raise ValueError(
            f"{name} needs a pair of channels for each of {axes} axes, got {channels}; use {2 * axes} or more"
        )
    return channels // (2 * axes)
