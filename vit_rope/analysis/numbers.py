"""Numbers about position schemes, the theory as running code; pictures of them are in `plots`."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..positions import Position, Rotary
from ..positions.rotary.base import geometric
from .certify import CertificateError, assert_relative, assert_reversible, relativity_error

__all__ = [
    "CertificateError",
    "Decay",
    "Flattening",
    "aliases",
    "assert_relative",
    "assert_reversible",
    "decay",
    "decay_bound",
    "distinct_bias_rows",
    "flattening",
    "frequency_rank",
    "kernel",
    "offsets",
    "padding_leak",
    "recommended_base",
    "relativity_error",
    "reversibility_margin",
]


# ---- what rotations make of displacements ---------------------------------------------------------------------------
def kernel(position: Position, displacements: Tensor, layer: int = 0) -> Tensor:
    """The mean cosine K(Δ) of the angles by which a rotary scheme turns displacements (..., A): (H, ...).

    It is the score, over its maximum, of a query and a key with equal content at that displacement, averaged over
    contents: long-range decay is its shape, and a scheme is reversible on a grid where only Δ = 0 reaches 1, for
    rotations of D channels satisfy ||R(p) - R(p')||² = 2 D (1 - K(p - p')). H is 1 where heads share their frequencies.
    Raises ValueError for a scheme that rotates nothing.
    """
    return _turns(position, displacements, layer).real.mean(dim=-1)


def decay_bound(position: Position, displacements: Tensor, layer: int = 0) -> Tensor:
    """Su's bound on decay at displacements (..., A): the mean (H, ...) of |S_i|, where S_i sums e^(iθ_jΔ) up to pair i.

    A score is at most R times this, times the largest step between the content's neighbouring pairs q_j conj(k_j)
    (arXiv:2104.09864, section 3.4.3). Raises ValueError for a scheme that rotates nothing.
    """
    return _turns(position, displacements, layer).cumsum(dim=-1).abs().mean(dim=-1)


def _turns(position: Position, displacements: Tensor, layer: int) -> Tensor:
    """Turns (H, ..., R), as complex numbers, of displacements (..., A)."""
    places = displacements.reshape(-1, displacements.shape[-1])
    turn = position(places).q.tables()
    if not turn:
        raise ValueError("a kernel needs a rotary scheme, such as axial or mixed; this one rotates nothing")
    found = torch.view_as_complex(turn[layer % len(turn)][0].contiguous()).transpose(0, 1)  # (H, N, R)
    return found.reshape(len(found), *displacements.shape[:-1], -1)


def reversibility_margin(position: Position, grid: tuple[int, ...], layer: int = 0) -> float:
    """How far the nearest other displacement of a grid stays from being no displacement: min over Δ ≠ 0 of 1 - K(Δ).

    Zero means that two places look the same to every pair of a head; the worst head counts.
    """
    displacements = offsets(grid).double()
    return float(1 - kernel(position, displacements[displacements.any(dim=-1)], layer).detach().max())


def aliases(position: Position, grid: tuple[int, ...], layer: int = 0) -> Tensor:
    """Displacements (n, A) of a grid that look as near as a neighbour to some head, and are not: the worst come first.

    Each stands for its opposite too. Those of RoPE over a flattened image are the wraps from the end of a row.
    """
    found = offsets(grid)
    found = found[len(found) // 2 + 1 :]  # the opposites come first
    near = kernel(position, torch.eye(len(grid), dtype=torch.float64), layer).amax(dim=-1, keepdim=True)
    excess = (kernel(position, found.double(), layer) - near).amax(dim=0)
    excess = excess.masked_fill(found.abs().sum(dim=-1) <= 1, -math.inf)
    order = excess.argsort(descending=True, stable=True)
    return found[order[excess[order] > -1e-6]]


def offsets(grid: tuple[int, ...]) -> Tensor:
    """All displacements (prod(2n - 1), A) between cells of a grid, in row-major order."""
    ranges = [torch.arange(1 - n, n) for n in grid]
    return torch.stack(torch.meshgrid(*ranges, indexing="ij"), dim=-1).flatten(0, -2)


def frequency_rank(position: Position) -> int:
    """The rank of a rotary scheme's frequencies (A, R), of its worst layer and head: how many axes it tells apart.

    Less than the number of axes means that some move changes nothing. Raises ValueError for other schemes.
    """
    if not isinstance(position, Rotary):
        raise ValueError(f"only rotary schemes have frequencies, got {type(position).__name__}")
    return int(torch.linalg.matrix_rank(position.frequencies(torch.zeros(1)).detach()).min())


# ---- geometric frequencies as functions of base and head size --------------------------------------------------------
class Decay(NamedTuple):
    """How K falls along one axis: where it first falls below 1/2, the highest it comes back to, and where it ends."""

    length: float  # inf where it does not
    ripple: float
    reach: float


def decay(base: float, pairs: int, span: int | None = None) -> Decay:
    """The decay of K(Δ) = mean_j cos(Δ base^(-j/P)) along one axis with P pairs, at whole Δ up to `span`.

    Beyond its reach, half a turn of the slowest pair at π base^((P - 1)/P), angles are new to all pairs; span is the
    reach unless given (at most 65536).
    """
    if base <= 0 or pairs < 1:
        raise ValueError(f"a decay needs a positive base and a pair or more, got base {base} and {pairs} pairs")
    reach = math.pi / float(geometric(pairs, base)[-1])
    curve = _curve(base, pairs, span or min(math.ceil(reach), 65536))
    below = (curve < 0.5).nonzero()
    if len(below) == 0:
        return Decay(math.inf, float(curve[-1]), reach)
    first = int(below[0])
    return Decay(float(first), float(curve[first:].max()), reach)


def recommended_base(grid: tuple[int, ...], head_dim: int) -> float:
    """The smallest base, to 1 %, with which axial frequencies keep K(Δ) at 0 or above on all of a grid's axes.

    A smaller one lets far places look opposite (the lower bound of arXiv:2405.14591), a larger one tells neighbours
    less apart. Raises ValueError where the head has no pair for each axis, or no base below 10^8 will do.
    """
    pairs = head_dim // (2 * len(grid))
    if pairs < 1:
        raise ValueError(f"head_dim {head_dim} has no pair for each of {len(grid)} axes; use {2 * len(grid)} or more")
    for step in range(1852):  # 1.01^1851 is 10^8
        if _curve(1.01**step, pairs, max(grid) - 1).min() >= 0:
            return 1.01**step
    raise ValueError(f"no base below 10^8 keeps {pairs} pairs for each axis above 0 over {max(grid)} cells")


def _curve(base: float, pairs: int, span: int) -> Tensor:
    """K (span + 1,) at Δ = 0 … span."""
    return (torch.arange(span + 1, dtype=torch.float64)[:, None] * geometric(pairs, base)).cos().mean(dim=-1)


# ---- flattening, biases, leaks ---------------------------------------------------------------------------------------
class Flattening(NamedTuple):
    """What row-major numbers make of distances: see `flattening`."""

    anisotropy: int
    wrap: float
    correlation: float


def flattening(grid: tuple[int, ...]) -> Flattening:
    """How row-major numbering distorts a grid.

    `anisotropy`: how far apart it puts neighbours along the first axis, those along the last being at 1; `wrap`: the
    largest distance of cells with consecutive numbers; `correlation` of number distance and distance over all pairs.
    """
    cells = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid)).view(-1, len(grid))
    if len(cells) < 3:
        raise ValueError(f"a correlation needs a grid of 3 cells or more, got {grid}")
    number = torch.arange(len(cells), dtype=torch.float64)[:, None]
    pairs = torch.stack((torch.pdist(number), torch.pdist(cells)))
    wrap = (cells[1:] - cells[:-1]).norm(dim=-1).max()
    return Flattening(math.prod(grid[1:]), float(wrap), float(torch.corrcoef(pairs)[0, 1]))


def distinct_bias_rows(position: Position, grid: tuple[int, ...], layer: int = 0) -> int:
    """How many of a grid's prod(2n - 1) displacements a relative bias tells apart, by all heads of a layer together.

    Counts what is added to logits, by bias or by channels beside, and what content meets in tables. Raises ValueError
    for a scheme that adds nothing.
    """
    there = offsets(grid).float()
    encoding = position(torch.zeros(1, len(grid)), key_coords=there)
    seen = []
    bias = encoding.bias(layer)
    if bias is not None:
        seen.append(bias[0, :, 0])
    if encoding.q.extra and encoding.k is not None and encoding.k.extra:
        one, two = (side.extra[layer % len(side.extra)][0] for side in (encoding.q, encoding.k) if side.extra)
        seen.append((one * two).sum(dim=-1))
    for table, index, _ in encoding.terms(layer, "q", "k", "v"):  # index T is no row
        seen.append(torch.nn.functional.pad(table, (0, 0, 0, 1))[:, index.flatten()].mT.flatten(0, 1))
    if not seen:
        raise ValueError("this scheme adds no bias and no relative term to logits")
    rows = torch.cat([part.detach().double() for part in seen]).t()
    return len(torch.unique((rows / rows.abs().max().clamp(min=1e-30) * 2**22).round(), dim=0))


def padding_leak(mixer: Callable[[Tensor], Tensor], shape: tuple[int, ...], channels: int = 1) -> Tensor:
    """How far a mixer of maps (1, C, *shape), such as a convolution, tells cells of a constant map apart, by depth.

    Entry d of the result (ceil(min(shape) / 2),) is the largest deviation, relative to the value at the centre, among
    cells at distance d from the border: zero padding leaks the place of as many cells as it reaches, circular padding
    of none (arXiv:2001.08248).
    """
    with torch.no_grad():
        out = mixer(torch.ones(1, channels, *shape))[0]
    centre = out[(slice(None), *(n // 2 for n in shape))].reshape(-1, *(1 for _ in shape))
    deviation = (out - centre).abs().amax(dim=0) / centre.abs().max().clamp(min=1e-30)
    inside = torch.stack(
        torch.meshgrid(*(torch.arange(n).minimum(n - 1 - torch.arange(n)) for n in shape), indexing="ij")
    )
    depth = inside.amin(dim=0)
    return torch.stack([deviation[depth == d].max() for d in range(int(depth.max()) + 1)])
