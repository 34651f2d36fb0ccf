"""Rotary position embedding along any number of axes.

Channel pairs of queries and keys rotate by angles that are linear in the token's coordinates,

    angle[token, pair] = sum_a coords[token, a] * freqs[a, pair],

so that a query-key product depends on two positions only through their displacement. Every scheme
whose rotations commute is one choice of `freqs`: one axis per pair is axial RoPE, all axes in every
pair is mixed RoPE, rows of (W f, f) are RoPE over the flattened image. To add one, return
`Rotary(freqs)` from a function decorated with `@register`. Modifiers of a scheme append pure
functions to its `changes`.

Shapes   L layers and H heads (1 if shared), N tokens, A axes, R pairs of the D channels of a head
Units    coordinates in the layout's unit, freqs in radians per unit
Pairs    `interleaved`: channels 2j and 2j + 1 rotate together, the block-diagonal matrix;
         `half`: j and j + R; `axis`: as half, but within the channels of each axis
Sources  RoFormer, arXiv:2104.09864 (one axis); RoPE-ViT, arXiv:2403.13298 (axial, mixed)
"""

import math
from collections.abc import Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn

from ..base import Composed
from ..encoding import Encoding
from ..transform import rotation_of
from .changes import Change

Pairs = Literal["interleaved", "half", "axis"]


def geometric(count: int, base: float) -> Tensor:
    """Frequencies (count,) that fall geometrically from 1 towards 1 / base, bit-exact with other
    libraries.
    """
    return 1.0 / base ** (torch.arange(count, dtype=torch.float32, device="cpu") / max(count, 1))


class Rotary(Composed):
    """Rotate channel pairs of queries and keys by coordinates times `freqs` (L, H, A, R), fixed or
    learned.

    Fixed frequencies are constants of the scheme, neither parameters nor buffers: no cast, no meta
    device and no checkpoint can change them. Learned ones are one float32 parameter, which keeps
    that precision under `.bfloat16()` and `.half()`. Reversible where the frequencies of all layers
    and heads together tell the cells of the training grid apart. Raises ValueError for frequencies
    of another shape or a value that is not finite.
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
        self.initial = freqs.detach().to("cpu", torch.float32)  # the fixed frequencies, or where learned ones start
        self.freqs = nn.Parameter(torch.empty(freqs.shape, dtype=torch.float32)) if learned else None
        self.changes: list[Change] = []
        Rotary.reset_parameters(self)

    def reset_parameters(self) -> None:
        if self.freqs is not None:
            with torch.no_grad():
                self.freqs.copy_(self.initial)

    def base_frequencies(self, coords: Tensor) -> Tensor:
        """Frequencies (L, H, A, R) before any change, on the coordinates' device and in their
        precision.
        """
        return self.initial.to(coords.device, coords.dtype) if self.freqs is None else self.freqs.to(coords.dtype)

    def frequencies(self, coords: Tensor, grid: Sequence[int] | None = None) -> Tensor:
        """Frequencies (L, H, A, R) for coordinates on a `grid`, with all changes."""
        return self._with_changes(self.base_frequencies(coords), grid)

    def initial_frequencies(self) -> Tensor:
        """Frequencies (L, H, A, R) before training, with all changes, on the CPU."""
        return self._with_changes(self.initial, None)

    def radians_per_cell(self, cells: Tensor) -> Tensor:
        return self.initial_frequencies().double() * cells.diff(dim=0)[0][:, None]

    def claims_besides(self, claim: Literal["reversible", "unbounded"]) -> bool:
        return False

    def _with_changes(self, freqs: Tensor, grid: Sequence[int] | None) -> Tensor:
        for change in self.changes:
            freqs = change(freqs, grid)
        return freqs

    def changed(self, change: Change) -> Self:
        """This scheme, with one more change; those that permute axes and pairs come before all
        others.
        """
        end = sum(each.permutes for each in self.changes) if change.permutes else len(self.changes)
        self.changes.insert(end, change)
        return self

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        freqs = self.frequencies(coords, grid)
        k = None if key_coords is None else rotation_of(freqs, key_coords)
        return Encoding(rotation_of(freqs, coords, grid), k, scale=self.scale, stride=self.stride)

    @property
    def scale(self) -> float:
        """The factor on the logits that changes ask for."""
        scale = 1.0
        for change in self.changes:
            scale *= change.scale
        return scale

    def extra_repr(self) -> str:
        freqs = self.initial_frequencies()
        layers, heads, axes, pairs = freqs.shape
        speeds = freqs.norm(dim=2)
        rotating = speeds[speeds > 0]
        periods = (
            f"{2 * math.pi / rotating.max():.3g} to {2 * math.pi / rotating.min():.3g}" if len(rotating) else "none"
        )
        kind = "learned from" if self.learned else "of"
        changes = "".join(f", {change}" for change in self.changes)
        shape = f"{pairs} {self.pairs} pairs on {axes} axes, {layers} layers x {heads} heads"
        return f"{shape}, {kind} periods {periods}{changes}"
