"""Absolute positions from waves: sinusoids, Fourier features, and rotations of the tokens.

Shapes   B samples, N tokens, A axes, C channels of a token, P frequencies of an axis, W waves
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.rotate import rotate
from ...ops.tables import cos_sin
from ..base import Layout, no_autocast
from ..rotary.base import geometric
from ..specs import register
from .base import Absolute


@register
class SinCos(Absolute):
    """Fixed sines and cosines of the coordinates (arXiv:1706.03762).

    Axes have equal shares of the channels. Each has P frequencies base^(-j/P) and fills P sines,
    then P cosines. Rows come first, as in
    MAE (arXiv:2111.06377). Remaining channels, at the end, are zero. With axes=1 the single axis
    is the flattened grid.

    Raises ValueError for a wrong number of axes, a base of 0 or less, or a width that is too small.
    """

    def __init__(self, layout: Layout, base: float = 10000.0, axes: int | None = None) -> None:
        super().__init__()
        if axes not in (None, 1, layout.axes):
            raise ValueError(f"sincos(axes=…) must be 1 or the number of axes of the grid, {layout.axes}, got {axes}")
        if base <= 0:
            raise ValueError(f"sincos needs a positive base, got {base}")
        self.layout, self.base, self.flattened = layout, base, axes == 1
        self.unbounded = not self.flattened or layout.axes == 1  # cell (0, W) would have the number of (1, 0)
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
class Fourier(Absolute):
    """Sines and cosines of the coordinates, and an MLP with one hidden layer and GELU.

    Coordinates p are scaled so that a grid spans [-1, 1] along each axis; other grids are stretched
    to the same span. `bands` is one of:

    - "octaves": sin and cos of 2^k pi p_a for k = 0 … count - 1 along each axis a, as in NeRF
      (arXiv:2003.08934). By default the shortest period is two cells of the training grid.
    - "learned": `count` (64) learned frequencies, each a vector over all axes, initialized from a
      normal distribution of one radian per cell: learnable Fourier features (arXiv:2106.02795).

    Raises ValueError for a count or a `hidden` width below 1.
    """

    def __init__(
        self,
        layout: Layout,
        bands: Literal["octaves", "learned"] = "octaves",
        count: int | None = None,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        octaves = bands == "octaves"
        if count is None:
            count = max(1, math.ceil(math.log2(max(layout.grid)))) if octaves else 64
        hidden = layout.width if hidden is None else hidden
        if count < 1 or hidden < 1:
            raise ValueError(f"fourier needs a count and a hidden width of at least 1, got {count} and {hidden}")
        self.layout, self.count, self.unbounded = layout, count, not octaves
        waves = count * layout.axes if octaves else count
        self.freqs = None if octaves else nn.Parameter(torch.empty(layout.axes, count))
        self.inner = nn.Parameter(torch.empty(hidden, 2 * waves))
        self.inner_bias = nn.Parameter(torch.empty(hidden))
        self.outer = nn.Parameter(torch.empty(layout.width, hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.freqs is not None:
            with torch.no_grad():  # one radian per cell; the span from -1 to 1 has n cells
                spans = torch.tensor(self.layout.grid, dtype=torch.float32, device=self.freqs.device)
                self.freqs.normal_().mul_(spans[:, None] / 2)
        nn.init.normal_(
            self.inner, std=(self.inner.shape[1] / 2) ** -0.5
        )  # the squares of a sine and its cosine sum to 1
        nn.init.zeros_(self.inner_bias)
        nn.init.normal_(self.outer, std=self.outer.shape[1] ** -0.5)

    def vectors(self, coords: Tensor, grid: Sequence[int] | None, layer: int) -> Tensor:
        inner, bias, outer = (weight.to(coords.dtype) for weight in (self.inner, self.inner_bias, self.outer))
        return F.linear(F.gelu(F.linear(self.waves(coords, grid), inner, bias)), outer)

    def waves(self, coords: Tensor, grid: Sequence[int] | None) -> Tensor:
        """Return sines, then cosines (…, 2W) at coordinates (…, A); octaves are ordered by axis."""
        cells = self.layout.cell(coords, grid)
        sizes = self.layout.grid if grid is None else grid
        points = torch.stack([(2 * cells[..., a] + 1) / n - 1 for a, n in enumerate(sizes)], dim=-1)
        if self.freqs is None:
            octaves = math.pi * 2 ** torch.arange(self.count, dtype=coords.dtype, device=coords.device)
            theta = (points[..., None] * octaves).flatten(-2)
        else:
            theta = (points[..., None] * self.freqs.to(coords.dtype)).sum(dim=-2)
        return torch.cat((theta.sin(), theta.cos()), dim=-1)


@register
class ComplexOrder(Absolute):
    """Channel pairs of a token, r e^{i phi}, rotated by its position: r e^{i (omega p + phi)}.

    Complex-valued embeddings (arXiv:1912.12333): amplitude and phase come from the token.
    Frequencies are learned, initialized as base^(-j/P), with P pairs for each axis. In the paper
    every word has its own frequencies; for patches they would depend on the content, so here all
    tokens share them. Inner products of two embeddings are then relative as in RoPE, but those of
    the queries and keys projected from them are not. Raises ValueError for a width that is too
    small, or a base of 0 or less.
    """

    def __init__(self, layout: Layout, base: float = 10000.0) -> None:
        pairs, axes = layout.width // (2 * layout.axes), layout.axes
        if pairs == 0 or base <= 0:
            raise ValueError(
                f"complexorder needs a positive base and channel pairs for each of {axes} axes, "
                f"got base {base} and width {layout.width}"
            )
        super().__init__()
        freqs = torch.zeros(1, 1, axes, axes * pairs, device="cpu")
        for axis in range(axes):
            freqs[..., axis, axis * pairs : (axis + 1) * pairs] = geometric(pairs, base)
        self.initial = freqs
        self.freqs = nn.Parameter(torch.empty(freqs.shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.freqs.copy_(self.initial)

    def add(self, x: Tensor, coords: Tensor, grid: Sequence[int] | None, layer: int = 0) -> Tensor:
        with no_autocast(coords.device):
            table = cos_sin(self.freqs.to(coords.dtype), coords, grid)[0]
        return rotate(x[:, None], table)[:, 0]
