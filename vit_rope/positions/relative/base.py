"""The base class of relative schemes, whose terms depend on the displacement and on the content of
tokens.

A scheme gives each displacement Δ = key - query along an axis a vector r with the channels of a
head. Attention adds q_i · r_ij to the logits ("q"), or k_j · r_ij ("k"), or adds Σ_j a_ij r_ij to
the outputs ("v"), for each axis. Products are computed once for each row of such a table and looked
up by pairs, so no tensor of N x M x D numbers is made. Flash kernels do not support these terms.

Displacements are in cells of the training grid. Those of a full grid are exact. For other
coordinates they are rounded to cells of the grid, and clamped to its border.

Shapes   L layers, H heads (1 if shared), D channels of a head, A axes,
         T displacements along an axis; tables (L, H, T, D)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import displacements
from ..base import Layout, Position
from ..encoding import ActsOn, Encoding, RelativeTerm


class RelativeTerms(Position):
    """A scheme with tables along each axis. Subclasses implement `rows`."""

    reversible = True
    keeps_flash = False
    unbounded = False

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def rows(self, axis: int, line: Tensor) -> list[tuple[ActsOn, Tensor]]:
        """Return tables (L, H, T, D) for the displacements `line` (T,) along an axis.

        Each comes with what it acts on: "q", "k" or "v".
        """
        raise NotImplementedError(f"{type(self).__name__} needs rows()")

    def encode(self, coords: Tensor, key_coords: Tensor | None, grid: Sequence[int] | None) -> Encoding:
        lines, index = displacements.along_axes(self.layout, coords, key_coords, grid)
        terms: list[list[RelativeTerm]] = []
        for axis, line in enumerate(lines):
            for acts_on, tables in self.rows(axis, line):
                terms.append([RelativeTerm(table, index[axis], acts_on) for table in tables])
        return Encoding(term_lists=by_layer(terms))


def by_layer(terms: list[list[RelativeTerm]]) -> list[list[RelativeTerm]]:
    """Transpose lists: from the layers of each term to the terms of each layer."""
    layers = max(len(term) for term in terms)
    return [[term[layer % len(term)] for term in terms] for layer in range(layers)]


def clipped_rows(line: Tensor, clip: int) -> Tensor:
    """Return the rows (T,) of displacements in a table for the integers from -clip to clip."""
    return line.round().clamp(-clip, clip).long() + clip


def sinusoids(line: Tensor, pairs: int, base: float = 10000.0) -> Tensor:
    """Return alternating sines and cosines (T, 2 · pairs) of displacements (T,)."""
    theta = line[:, None] * base ** (-torch.arange(pairs, dtype=line.dtype, device=line.device) / pairs)
    return torch.stack((theta.sin(), theta.cos()), dim=-1).flatten(1)
