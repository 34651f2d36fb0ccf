"""Properties of position schemes as numbers; `vit_rope.plots` draws some of them.

Shapes   A axes, H heads (1 if all heads share their frequencies), R channel pairs that rotate,
         D = 2·R channels of a head, Δ displacements (..., A) in cells of the training grid,
         whatever the unit and the origin of the scheme's coordinates
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..positions import Position, Rotary
from ..positions.rotary.base import geometric


# ---- the kernel of a rotary scheme ---------------------------------------------------------------
def kernel(position: Position, displacements: Tensor, layer: int = 0) -> Tensor:
    """The kernel K(Δ) (H, ...) of a rotary scheme at displacements (..., A).

    K(Δ) is the mean cosine of the angles by which the pairs of a head rotate over Δ. It is the
    score of a query and a key with equal content at that displacement, divided by the score at Δ =
    0 and averaged over contents. Its shape shows long-range decay. A scheme is reversible on a grid
    if only Δ = 0 gives K = 1, because ||R(p) - R(p')||² = 2 D (1 - K(p - p')) for rotations R(p) of
    D channels.

    A scheme that `build` did not make has no layout: Δ is then in its coordinates. Raises
    ValueError for a scheme that rotates nothing.
    """
    return _phases(position, displacements, layer).real.mean(dim=-1)


def decay_bound(position: Position, displacements: Tensor, layer: int = 0) -> Tensor:
    """Su's bound (H, ...) on the decay of scores at displacements (..., A).

    It is the mean of |S_i| over i, where S_i sums e^(iθ_jΔ) over the pairs j up to i. The absolute
    value of a score is at most R times this bound, times the largest difference between
    neighbouring pairs of the content q_j conj(k_j), where 0 follows the last pair: equal content
    has one step, from its last pair to 0 (arXiv:2104.09864, section 3.4.3).

    Raises ValueError for a scheme that rotates nothing.
    """
    return _phases(position, displacements, layer).cumsum(dim=-1).abs().mean(dim=-1)


def _phases(position: Position, displacements: Tensor, layer: int) -> Tensor:
    """Rotations (H, ..., R) from cell 0 to displacements (..., A), as complex numbers e^(iθ)."""
    cells = displacements.reshape(-1, displacements.shape[-1])
    table = position(_coords(position, torch.cat((torch.zeros_like(cells[:1]), cells)))).rotation(layer)
    if table is None:
        raise ValueError("a kernel needs a rotary scheme, such as axial or mixed; this one rotates nothing")
    phases = torch.view_as_complex(table[0].contiguous()).transpose(0, 1)  # (H, 1 + N, R)
    phases = phases[:, 1:] * phases[:, :1].conj()
    return phases.reshape(len(phases), *displacements.shape[:-1], -1)


def _coords(position: Position, cells: Tensor) -> Tensor:
    """Coordinates (..., A) of cells (..., A) of the training grid, as the layout measures them."""
    layout, cells = position.made_for, cells if cells.is_floating_point() else cells.double()
    if layout is None:
        return cells
    first, next_cell = layout.cell(torch.zeros_like(cells[:1])), layout.cell(torch.ones_like(cells[:1]))
    return (cells - first) / (next_cell - first)


def reversibility_margin(position: Position, grid: tuple[int, ...], layer: int = 0) -> float:
    """The minimum of 1 - K(Δ) over all displacements Δ ≠ 0 of a grid, of the worst head.

    Zero means that some head cannot distinguish two cells.
    """
    displacements = offsets(grid).double()
    return float(1 - kernel(position, displacements[displacements.any(dim=-1)], layer).detach().max())


def aliases(position: Position, grid: tuple[int, ...], layer: int = 0) -> Tensor:
    """Displacements (n, A) of a grid that some head scores at least as high as an adjacent cell.

    Adjacent cells themselves are left out. The worst come first, and each stands for its opposite
    too. For RoPE over a flattened image, these are the wraps from the end of one row to the start
    of the next.
    """
    displacements = offsets(grid)
    displacements = displacements[len(displacements) // 2 + 1 :]  # the first half holds their opposites
    adjacent = kernel(position, torch.eye(len(grid), dtype=torch.float64), layer).amax(dim=-1, keepdim=True)
    excess = (kernel(position, displacements.double(), layer) - adjacent).amax(dim=0)
    excess = excess.masked_fill(displacements.abs().sum(dim=-1) <= 1, -math.inf)
    order = excess.argsort(descending=True, stable=True)
    return displacements[order[excess[order] > -1e-6]]


def offsets(grid: tuple[int, ...]) -> Tensor:
    """All displacements (prod(2n - 1), A) between cells of a grid, in row-major order."""
    ranges = [torch.arange(1 - n, n) for n in grid]
    return torch.stack(torch.meshgrid(*ranges, indexing="ij"), dim=-1).flatten(0, -2)


def frequency_rank(position: Position) -> int:
    """The rank of a rotary scheme's frequencies (A, R), of its worst layer and head.

    A rank below the number of axes means that moving along some direction rotates nothing. Raises
    ValueError for other schemes.
    """
    if not isinstance(position, Rotary):
        raise ValueError(f"only rotary schemes have frequencies, got {type(position).__name__}")
    return int(torch.linalg.matrix_rank(position.frequencies(torch.zeros(1)).detach()).min())


# ---- geometric frequencies as functions of base and head size ------------------------------------
class Decay(NamedTuple):
    """The decay of K along one axis.

    `length`: the first distance at which K is below 1/2, inf if there is none; `ripple`: the
    maximum of K from there on; `horizon`: the distance at which the slowest pair has rotated by π.
    """

    length: float
    ripple: float
    horizon: float


def decay(base: float, pairs: int, max_distance: int | None = None) -> Decay:
    """The decay of K(Δ) = mean_j cos(Δ base^(-j/P)) along one axis with P = `pairs` pairs.

    K is evaluated at integer distances up to `max_distance`, by default up to the horizon
    π base^((P - 1)/P), but at most 65536. Raises ValueError if `base` or `pairs` is not positive.
    """
    if base <= 0 or pairs < 1:
        raise ValueError(f"decay needs a positive base and at least one pair, got base {base} and {pairs} pairs")
    horizon = math.pi / float(geometric(pairs, base)[-1])
    curve = _axis_kernel(base, pairs, max_distance or min(math.ceil(horizon), 65536))
    below = (curve < 0.5).nonzero()
    if len(below) == 0:
        return Decay(math.inf, float(curve[-1]), horizon)
    first = int(below[0])
    return Decay(float(first), float(curve[first:].max()), horizon)


def recommended_base(grid: tuple[int, ...], head_dim: int) -> float:
    """The smallest base, to within 1 %, with which axial frequencies keep K(Δ) >= 0 on a grid.

    That is along each of its axes. With a smaller base, distant cells get negative scores (the
    lower bound of arXiv:2405.14591). With a larger one, adjacent cells are harder to distinguish.
    Raises ValueError if the head has fewer than one pair per axis, or if no base up to 10^8
    suffices.
    """
    pairs = head_dim // (2 * len(grid))
    if pairs < 1:
        raise ValueError(
            f"head_dim {head_dim} has less than one pair for each of {len(grid)} axes; use {2 * len(grid)} or more"
        )
    for step in range(1852):  # 1.01^1851 is 10^8
        if _axis_kernel(1.01**step, pairs, max(grid) - 1).min() >= 0:
            return 1.01**step
    raise ValueError(f"no base up to 10^8 keeps K at or above 0 with {pairs} pairs per axis over {max(grid)} cells")


def _axis_kernel(base: float, pairs: int, max_distance: int) -> Tensor:
    """K (max_distance + 1,) at Δ = 0 … max_distance along one axis."""
    return (torch.arange(max_distance + 1, dtype=torch.float64)[:, None] * geometric(pairs, base)).cos().mean(dim=-1)


# ---- flattening, biases, leaks -------------------------------------------------------------------
class Flattening(NamedTuple):
    """How row-major numbering distorts the distances of a grid.

    `anisotropy`: the difference of numbers between neighbours along the first axis, where
    neighbours along the last axis differ by 1; `wrap`: the largest distance between cells with
    consecutive numbers; `correlation`: that of differences of numbers with distances, over all
    pairs of cells.
    """

    anisotropy: int
    wrap: float
    correlation: float


def flattening(grid: tuple[int, ...]) -> Flattening:
    """How row-major numbering distorts the distances of a grid.

    Raises ValueError for a grid of fewer than three cells.
    """
    cells = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid)).view(-1, len(grid))
    if len(cells) < 3:
        raise ValueError(f"a correlation needs a grid of at least 3 cells, got {grid}")
    number = torch.arange(len(cells), dtype=torch.float64)[:, None]
    pairs = torch.stack((torch.pdist(number), torch.pdist(cells)))
    wrap = (cells[1:] - cells[:-1]).norm(dim=-1).max()
    return Flattening(math.prod(grid[1:]), float(wrap), float(torch.corrcoef(pairs)[0, 1]))


def distinct_bias_rows(position: Position, grid: tuple[int, ...], layer: int = 0) -> int:
    """How many of a grid's prod(2n - 1) displacements a relative bias distinguishes.

    Two displacements are distinct if any head of the layer treats them differently. Everything that
    is added to logits counts: biases, products of extra channels, and the table rows that content
    is multiplied with. Raises ValueError for a scheme that adds nothing.
    """
    cells = offsets(grid).double()
    encoding = position(_coords(position, torch.zeros_like(cells[:1])), key_coords=_coords(position, cells))
    parts = []
    bias = encoding.bias(layer)
    if bias is not None:
        parts.append(bias[0, :, 0])
    q, k = encoding.extra("q", layer), encoding.extra("k", layer)
    if q is not None and k is not None:
        parts.append((q[0] * k[0]).sum(dim=-1))
    for table, index, _ in encoding.terms(layer, "q", "k", "v"):  # index T means no row
        parts.append(torch.nn.functional.pad(table, (0, 0, 0, 1))[:, index.flatten()].mT.flatten(0, 1))
    if not parts:
        raise ValueError("this scheme adds no bias and no relative term to logits")
    rows = torch.cat([part.detach().double() for part in parts]).t()
    return len(torch.unique((rows / rows.abs().max().clamp(min=1e-30) * 2**22).round(), dim=0))


def padding_leak(mixer: Callable[[Tensor], Tensor], shape: tuple[int, ...], channels: int = 1) -> Tensor:
    """How much the padding of a mixer of maps, such as a convolution, reveals position.

    `mixer` maps (1, C, *shape) to (1, C', *shape) and is applied to a constant map. Entry d of the
    result (ceil(min(shape) / 2),) is the largest deviation from the value at the centre, relative
    to that value, among cells at distance d from the border. Zero padding reveals the position of
    cells within its receptive field of the border, circular padding of none (arXiv:2001.08248).
    """
    with torch.no_grad():
        out = mixer(torch.ones(1, channels, *shape))[0]
    centre = out[(slice(None), *(n // 2 for n in shape))].reshape(-1, *(1 for _ in shape))
    deviation = (out - centre).abs().amax(dim=0) / centre.abs().max().clamp(min=1e-30)
    to_border = (torch.arange(n).minimum(n - 1 - torch.arange(n)) for n in shape)
    depth = torch.stack(torch.meshgrid(*to_border, indexing="ij")).amin(dim=0)
    return torch.stack([deviation[depth == d].max() for d in range(int(depth.max()) + 1)])
