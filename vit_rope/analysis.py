"""Numbers about position schemes; pictures of them are in `plots`."""

import torch
from torch import Tensor

from .positions import Position
from .positions.encoding import tables


def kernel(position: Position, displacements: Tensor, layer: int = 0) -> Tensor:
    """The mean cosine K(Δ) of the angles by which a rotary scheme turns displacements (..., A): (H, ...).

    It is the score, over its maximum, of a query and a key with equal content at that displacement, averaged over
    contents: long-range decay is its shape, and a scheme is reversible on a grid where only Δ = 0 reaches 1. H is 1
    where heads share their frequencies. Raises ValueError for a scheme that rotates nothing.
    """
    places = displacements.reshape(-1, displacements.shape[-1])
    turn = tables(position(places).q)
    if not turn:
        raise ValueError("a kernel needs a rotary scheme, such as axial or mixed; this one rotates nothing")
    cosines = turn[layer % len(turn)][0, ..., 0].mean(dim=-1)  # (N, H)
    return cosines.t().reshape(-1, *displacements.shape[:-1])


def reversibility_margin(position: Position, grid: tuple[int, ...], layer: int = 0) -> float:
    """How far the nearest other displacement of a grid stays from being no displacement: min over Δ ≠ 0 of 1 - K(Δ).

    Zero means that two places look the same to every pair of a head; the worst head counts.
    """
    ranges = [torch.arange(1 - n, n, dtype=torch.float64) for n in grid]
    displacements = torch.stack(torch.meshgrid(*ranges, indexing="ij"), dim=-1).flatten(0, -2)
    displacements = displacements[displacements.any(dim=-1)]
    return float(1 - kernel(position, displacements, layer).max())
