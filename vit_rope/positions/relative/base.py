"""TODO positions.relative.base from ['positions.relative']."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import displacements
from ..base import Layout, Position
from ..encoding import ActsOn, Encoding, RelativeTerm


class RelativeTerms(Position):
    """Terms that tables along each axis make; subclasses write `rows`."""

    reversible = True
    keeps_flash = False
    unbounded = False

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def rows(self, axis: int, line: Tensor) -> list[tuple[ActsOn, Tensor]]:
        """What tables (L, H, T, D) of displacements `line` (T,) along an axis act on: "q", "k" or "v"."""
        raise NotImplementedError(f"{type(self).__name__} needs rows()")

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        lines, index = displacements.along_axes(self.layout, coords, key_coords, grid)
        terms: list[list[RelativeTerm]] = []
        for axis, line in enumerate(lines):
            for on, tables in self.rows(axis, line):
                terms.append([RelativeTerm(table, index[axis], on) for table in tables])
        return Encoding(term_lists=by_layer(terms))


def by_layer(terms: list[list[RelativeTerm]]) -> list[list[RelativeTerm]]:
    """Terms, each for all layers, as all of each layer."""
    layers = max(len(term) for term in terms)
    return [[term[layer % len(term)] for term in terms] for layer in range(layers)]


def clipped(line: Tensor, reach: int) -> Tensor:
    """Rows (T,) of displacements, to whole cells, in a table of those from -reach to reach."""
    return line.round().clamp(-reach, reach).long() + reach


def sinusoids(line: Tensor, pairs: int, base: float = 10000.0) -> Tensor:
    """Sines and cosines in turn (T, 2 · pairs) of displacements (T,)."""
    theta = line[:, None] * base ** (-torch.arange(pairs, dtype=line.dtype, device=line.device) / pairs)
    return torch.stack((theta.sin(), theta.cos()), dim=-1).flatten(1)
