"""TODO positions.rotary.base from ['positions.rotary']."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ...ops.tables import cos_sin
from ..base import Position
from ..encoding import DeferredRotation, Encoding, Transform

Pairs = Literal["interleaved", "half", "axis"]
TABLES = (
    64 * 2**20
)  # bytes of turns that all layers at once may take; beyond, each layer makes its own when it needs it


def geometric(count: int, base: float) -> Tensor:
    """Frequencies (count,) that fall geometrically from 1 towards 1 / base, to the last bit as others compute them."""
    return 1.0 / base ** (torch.arange(count, dtype=torch.float32, device="cpu") / max(count, 1))


def rotation_of(freqs: Tensor, coords: Tensor, grid: Sequence[int] | None = None) -> Transform:
    """Queries or keys that turn by frequencies (L, H, A, R): tables of all layers, or what makes them if too large."""
    if not torch.compiler.is_compiling() and len(freqs) > 1:
        layers, heads, _, pairs = freqs.shape
        if 2 * layers * heads * pairs * coords.shape[:-1].numel() * freqs.element_size() > TABLES:
            sizes = None if grid is None else list(grid)
            return Transform(angles=[DeferredRotation(some, coords, sizes) for some in freqs.split(1)])
    return Transform(turn=list(cos_sin(freqs, coords, grid).unbind(0)))


class Rotary(Position):
    """Turn channel pairs of queries and keys by coordinates times `freqs` (L, H, A, R), fixed or learned.

    Fixed frequencies are constants of the scheme, neither parameters nor buffers: no cast, no meta device and no
    checkpoint can change them. Learned ones are one float32 parameter, which keeps that precision under `.bfloat16()`
    and `.half()`. Reversible where the frequencies of each layer and head tell all axes apart. Raises ValueError for
    frequencies of another shape or a value that is not finite.
    """

    def __init__(self, freqs: Tensor, pairs: Pairs = "interleaved", learned: bool = False) -> None:
        super().__init__()
        if freqs.ndim != 4:
            raise ValueError(f"frequencies must be (layers, heads, axes, pairs), got shape {tuple(freqs.shape)}")
        if not freqs.isfinite().all():
            raise ValueError("frequencies must be finite")
        if pairs == "axis" and freqs.shape[-1] % freqs.shape[-2]:
            raise ValueError(
                f'pairs="axis" needs as many for each axis, got {freqs.shape[-1]} pairs for {freqs.shape[-2]} axes'
            )
        self.axes, self.pairs = freqs.shape[-2], pairs
        self.stride = {"interleaved": 1, "half": freqs.shape[-1], "axis": freqs.shape[-1] // self.axes}[pairs]
        self.initial = freqs.detach().to("cpu", torch.float32)  # what fixed frequencies are and learned ones begin as
        self.reversible = bool((torch.linalg.matrix_rank(self.initial) == self.axes).all())
        self.freqs = nn.Parameter(torch.empty(freqs.shape, dtype=torch.float32)) if learned else None
        Rotary.reset_parameters(self)

    def reset_parameters(self) -> None:
        if self.freqs is not None:
            with torch.no_grad():
                self.freqs.copy_(self.initial)

    def frequencies(self, coords: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Frequencies (L, H, A, R) for coordinates on a `grid`, on the coordinates' device and in their precision."""
        if self.freqs is not None:
            return self.freqs.to(coords.dtype)
        return self.initial.to(coords.device, coords.dtype)

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        freqs = self.frequencies(coords, grid)
        k = None if key_coords is None else rotation_of(freqs, key_coords)
        return Encoding(rotation_of(freqs, coords, grid), k, stride=self.stride)

    def extra_repr(self) -> str:
        layers, heads, axes, pairs = self.initial.shape
        speeds = self.initial.norm(dim=2)
        rotating = speeds[speeds > 0]
        periods = (
            f"{2 * math.pi / rotating.max():.3g} to {2 * math.pi / rotating.min():.3g}" if len(rotating) else "none"
        )
        kind = "learned from" if self.learned else "of"
        return f"{pairs} {self.pairs} pairs on {axes} axes, {layers} layers x {heads} heads, {kind} periods {periods}"


class LearnedSpeeds(Rotary):
    """A Rotary that turns along fixed `directions` (A, R), at `speeds` (L, H, R) that it learns, from the given on."""

    def __init__(self, directions: Tensor, speeds: Tensor, pairs: Pairs = "interleaved") -> None:
        super().__init__(directions * speeds[:, :, None], pairs)
        self.directions = directions.to("cpu", torch.float32)
        self.first = speeds.to("cpu", torch.float32)
        self.speeds = nn.Parameter(torch.empty(speeds.shape, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.speeds.copy_(self.first)

    def frequencies(self, coords: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        return self.speeds.to(coords.dtype)[:, :, None] * self.directions.to(coords.device, coords.dtype)
