"""What a position scheme is.

A position scheme is a function of coordinates. Attention asks it what to do and never asks which
scheme it is.

A scheme can act in two ways. `encode` maps coordinates to an `Encoding`, once per forward pass:
tensors that tell attention how to rotate queries and keys and what to add to their logits. `add`
acts earlier, on the tokens themselves, for absolute schemes. The base class does neither, so a
scheme overrides only what it needs.

Shapes   B samples, N tokens, A axes, C channels of a token
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn

from .coords import cell as cell_index
from .coords import check_coords, check_shape, check_unit
from .coords import grid as make_grid
from .distinct import distinct
from .encoding import Encoding


@dataclass(frozen=True)
class Layout:
    """Everything that a scheme is told about its model.

    `width` channels in `heads` heads, `grid` cells along each axis in training, `depth` layers;
    coordinates in `unit` and relative to `origin`, as `coords.grid` defines them. Raises ValueError
    where width does not divide by heads.
    """

    width: int
    heads: int
    grid: tuple[int, ...]
    depth: int = 12
    unit: str = "index"
    origin: float | str | tuple[float, ...] = field(default=0.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        check_shape(self.grid)
        check_unit(self.unit)
        for name in ("width", "heads", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"a layout needs a {name} of at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide by {self.heads} heads")

    @property
    def axes(self) -> int:
        """The number of axes A of the grid."""
        return len(self.grid)

    @property
    def head_dim(self) -> int:
        """The channels of one head."""
        return self.width // self.heads

    def coords(self, shape: Sequence[int] | None = None, device: torch.device | None = None) -> Tensor:
        """Coordinates (N, A) of a grid of this shape, or of the training grid, in this layout's
        unit and origin.
        """
        return make_grid(self.grid if shape is None else shape, self.unit, self.origin, device)

    def cell(self, coords: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Cell indices (…, A), fractional between cells, of coordinates (…, A) on this or on the
        training grid.
        """
        return cell_index(coords, self.grid if grid is None else grid, self.unit, self.origin)

    def neighbors(self) -> Tensor:
        """Coordinates (2, A) of 0 and of its diagonal neighbor on the training grid, on the CPU."""
        ends = torch.tensor([[0.0], [1.0]], device="cpu").expand(2, self.axes)
        pitch = 1 / self.cell(ends).diff(dim=0)
        return torch.cat((torch.zeros_like(pitch), pitch))

    def flatten(self, coords: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Row-major cell numbers (…, 1) of coordinates (…, A) on this or on the training grid."""
        sizes, cells = self.grid if grid is None else grid, self.cell(coords, grid)
        number = cells[..., :1]
        for a in range(1, len(sizes)):
            number = number * sizes[a] + cells[..., a : a + 1]
        return number


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Switch autocast off, because it would round positions; the meta device has no autocast."""
    if device.type == "meta" or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type)):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class Position(nn.Module):
    """A position scheme. This base is `none`: tokens form a set.

    Learned parameters stay in float32 (or float64) under `.bfloat16()` and `.half()`.
    """

    # claims, which tests check for every scheme
    relative: bool = True  # logits depend only on displacements
    reversible: bool = False  # no two cells of the training grid look the same
    keeps_flash: bool = True  # attention needs no mask
    unbounded: bool = False  # every coordinate has an encoding of its own, also beyond the training grid
    each_layer: bool = False  # `add` acts again before the layers after the first

    axes: int | None = None  # the number of axes that coordinates must have; None accepts any
    made_for: Layout | None = None  # the layout that `build` made it for
    spec: str = ""  # the spec that `build` made it from

    @property
    def learned(self) -> bool:
        """Whether training changes the scheme."""
        return any(True for _ in self.parameters())

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        """The encoding of tokens at `coords` (N, A) or (B, N, A), with keys at `key_coords` if they
        are elsewhere.

        `grid`, if given, is the grid that the tokens come from.
        """
        return Encoding()

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        """Patch tokens x (B, N, C) with their absolute positions added, unchanged where the scheme
        has none.

        Called before the first layer, and before each `layer` after it where `each_layer` is True.
        """
        return x

    def reset_parameters(self) -> None:
        """Draw the scheme's own parameters again."""

    def radians_per_cell(self, cells: Tensor) -> Tensor | None:
        """Radians per cell (L, H, A, R) by which queries and keys rotate before training, or None
        without rotations that are linear in the coordinates.

        `cells` (2, A) are the coordinates of two diagonal neighbours of a grid, as the scheme sees
        them.
        """
        return None

    def claims_besides(self, claim: Literal["reversible", "unbounded"]) -> bool:
        """Whether a claim holds by what the scheme does besides rotating by `radians_per_cell`."""
        return bool(getattr(self, claim))

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
        """Encode tokens at `coords` (N, A) or (B, N, A) that follow `prefix` tokens without a
        position.

        Keys are the same tokens unless `key_coords` (and `key_prefix`) are given. `grid` is the
        grid that the tokens come from, if any. Coordinates (N, A) with one row per cell of that
        grid must then be all of it, in row-major order and separable by axis, as `coords.grid`
        makes them (shifted or stretched, but not cell by cell). Raises TypeError or ValueError for
        coordinates of another type or number of axes.
        """
        coords = self._check(coords, grid)
        if key_coords is not None:
            key_coords = check_coords(key_coords, self.axes)
        with no_autocast(coords.device):
            encoding = self.encode(coords, key_coords, grid)
        return encoding.behind(prefix, prefix if key_prefix is None else key_prefix)

    def embed(self, x: Tensor, coords: Tensor, grid: list[int] | None = None, layer: int = 0) -> Tensor:
        """Patch tokens x (B, N, C) with their absolute positions added, for `coords` and `grid` as
        in a call.
        """
        return self.add(x, self._check(coords, grid), grid, layer)

    def _check(self, coords: Tensor, grid: Sequence[int] | None) -> Tensor:
        return check_coords(coords, self.axes, finite=None if grid is None else False)  # those of a grid are finite


class Composed(Position):
    """A scheme that may rotate and do more: either can tell two coordinates apart.

    Rotations do so if their angles differ by more than full revolutions. The rotations of several
    schemes add up, so both claims are about the sum of their speeds.
    """

    @property
    def reversible(self) -> bool:  # pyrefly: ignore[bad-override]
        """Whether no two cells of the training grid look the same."""
        return self.claims_besides("reversible") or distinct(*self._rotations_per_cell())

    @property
    def unbounded(self) -> bool:  # pyrefly: ignore[bad-override]
        """Whether every coordinate has an encoding of its own, also beyond the training grid."""
        return self.claims_besides("unbounded") or distinct(*self._rotations_per_cell(), beyond=True)

    def _rotations_per_cell(self) -> tuple[Tensor | None, tuple[int, ...] | None]:
        """Radians per cell, and the training grid; per unit, and None, if the layout is unknown."""
        layout = self.made_for
        if layout is None:
            return self.radians_per_cell(torch.tensor([[0.0], [1.0]], device="cpu").expand(2, self.axes or 1)), None
        return self.radians_per_cell(layout.neighbors()), layout.grid


class Sum(Composed):
    """Several schemes at once, e.g. a rotation and a learned table: rotations compose, biases and
    embeddings add up.
    """

    def __init__(self, *parts: Position) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.relative = all(part.relative for part in parts)
        self.keeps_flash = all(part.keeps_flash for part in parts)
        self.each_layer = any(part.each_layer for part in parts)
        self.made_for = next((part.made_for for part in parts if part.made_for is not None), None)

    def radians_per_cell(self, cells: Tensor) -> Tensor | None:
        each = [cast(Position, part).radians_per_cell(cells) for part in self.parts]
        rotating = [speeds for speeds in each if speeds is not None]
        return functools.reduce(torch.add, rotating) if rotating else None

    def claims_besides(self, claim: Literal["reversible", "unbounded"]) -> bool:
        return any(cast(Position, part).claims_besides(claim) for part in self.parts)

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        for part in self.parts:
            if layer == 0 or part.each_layer:
                x = cast(Position, part).add(x, coords, grid, layer)
        return x

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        encodings = (cast(Position, part).encode(coords, key_coords, grid) for part in self.parts)
        return functools.reduce(Encoding.combined, encodings, Encoding())


class Wrapper(Composed):
    """A scheme around another one, whose claims and actions it takes over; subclasses change some
    of them.

    `measure` is how the inner scheme sees the coordinates of a grid.
    """

    same_extent: bool = False  # whether the inner scheme sees grids of all sizes extend equally far

    def __init__(self, scheme: Position) -> None:
        super().__init__()
        self.scheme = scheme
        self.relative, self.keeps_flash = scheme.relative, scheme.keeps_flash
        self.each_layer = self.each_layer or scheme.each_layer
        self.made_for = scheme.made_for

    def radians_per_cell(self, cells: Tensor) -> Tensor | None:
        layout = self.made_for
        return self.scheme.radians_per_cell(cells if layout is None else self.measure(cells, layout.grid))

    def claims_besides(self, claim: Literal["reversible", "unbounded"]) -> bool:
        return self.scheme.claims_besides(claim)

    def measure(self, coords: Tensor, grid: Sequence[int]) -> Tensor:
        """Coordinates (…, A) on `grid` as the inner scheme sees them."""
        return coords

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        return self.scheme.add(x, coords, grid, layer)

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        return self.scheme.encode(coords, key_coords, grid)


def check_pairs(name: str, channels: int, axes: int) -> int:
    """How many pairs of channels each axis gets; ValueError where that is none."""
    if channels < 2 * axes:
        raise ValueError(
            f"{name} needs a pair of channels for each of {axes} axes, got {channels}; use {2 * axes} or more"
        )
    return channels // (2 * axes)
