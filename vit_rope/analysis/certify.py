"""Certificates that a position scheme is relative, or distinguishes all cells of a grid.

Both certificates treat a scheme as a black box. They compute attention on random contents in
float64 and use only its results, so they also work for user-defined schemes:
`assert_relative(build("mixed", layout))`, `assert_reversible(MyScheme(layout), (14, 14), layout)`.

Shapes   N, M tokens, A axes, H heads, D channels of a head, C = H·D channels
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..attention import attend
from ..positions import Encoding, Layout, Position

MAX_TOKENS = 64  # how many tokens of a grid are compared at most


class CertificateError(AssertionError):
    """A scheme fails a certificate; the message says where and by how much."""


def assert_relative(module: nn.Module, layout: Layout | None = None, tolerance: float = 1e-5, seed: int = 0) -> float:
    """Certify that attention depends only on coordinates, and only on their differences.

    `module` is a position scheme, or a model whose `.position` is one. A scheme that was not made
    by `build` needs the `layout` that it was made for. Tokens without a position (class and
    register tokens) are not part of the check: attention to them may depend on the origin.

    Returns the error: the largest change of logits or outputs when all coordinates are shifted,
    divided by their standard deviation. Raises CertificateError if it exceeds `tolerance`, or if
    reordering tokens together with their coordinates changes outputs by more than that.
    """
    position, layout = _scheme_and_layout(module, layout)
    probe = _Probe(position, layout, seed)
    order = torch.randperm(len(probe.coords), generator=probe.generator)
    reordered = probe.attention(probe.coords[order], order)
    pairs = zip(probe.reference.outputs, reordered.outputs, strict=True)
    error = max(_relative_change(a[..., order, :], b) for a, b in pairs)
    if error > tolerance:
        raise CertificateError(
            f"not a function of coordinates: reordering tokens together with their coordinates "
            f"changes their outputs by {error:.2g} standard deviations; compute every table from the "
            f"coordinates of the call, not from the order of the tokens"
        )
    error, shift = probe.largest_change_by_shifts()
    if error > tolerance:
        raise CertificateError(
            f"not relative: shifting all tokens by {_format(shift)} changes logits or outputs by {error:.2g} "
            f"standard deviations; rotations must commute, rotate both channels of a pair by the same angle, "
            f"and act on queries and keys alike (or set relative = False)"
        )
    return error


def assert_reversible(
    module: nn.Module, grid: tuple[int, ...], layout: Layout | None = None, tolerance: float = 1e-4, seed: int = 0
) -> float:
    """Certify that attention can distinguish all cells of a grid.

    `module` and `layout` are as in `assert_relative`. Two positions are indistinguishable if tokens
    of equal content there give and receive equal attention, to and from every position, in all
    heads and layers.

    Returns the margin: how much the logits of the two most similar positions differ, divided by the
    standard deviation of all logits. Raises CertificateError if it is below `tolerance`.
    """
    position, layout = _scheme_and_layout(module, layout)
    margin, first, second = nearest(position, layout, layout.coords(grid).double(), seed)
    if margin < tolerance:
        raise CertificateError(
            f"not reversible: positions {_format(first)} and {_format(second)} look the same to every query and "
            f"key, their logits differ by {margin:.2g} standard deviations; frequencies must have full rank over "
            f"the axes and must not repeat within the grid"
        )
    return margin


def relativity_error(module: nn.Module, layout: Layout | None = None, seed: int = 0) -> float:
    """The largest change of logits or outputs when all coordinates are shifted.

    It is in standard deviations of the logits or outputs, and 0 up to rounding for relative
    schemes. Arguments are as in `assert_relative`.
    """
    return _Probe(*_scheme_and_layout(module, layout), seed).largest_change_by_shifts()[0]


def nearest(position: Position, layout: Layout, coords: Tensor, seed: int = 0) -> tuple[float, Tensor, Tensor]:
    """The two of the positions (N, A) that attention can distinguish least.

    Returns how much their logits differ, in standard deviations of all logits, and their
    coordinates (A,) and (A,). Logits of all layers and heads are summed with random weights, which
    hides a difference only with probability zero.
    """
    generator = torch.Generator().manual_seed(seed)
    probes = coords[torch.randperm(len(coords), generator=generator)[:MAX_TOKENS]]
    content = torch.randn(layout.width, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, layout.width, layout.width, generator=generator, dtype=torch.float64) / layout.width**0.5
    factors = torch.randn(2, layout.depth, layout.heads, 1, 1, generator=generator, dtype=torch.float64)
    sums = []  # logits (N, M) from each position to the probes, and from the probes to it
    for (queries, keys), factor in zip(((coords, probes), (probes, coords)), factors, strict=True):
        encoding = position(queries, key_coords=keys)
        q, k = (
            _split_heads(_embedded(position, layout, content.expand(1, len(c), -1), c) @ w, layout)
            for c, w in zip((queries, keys), weights, strict=True)
        )
        layers = [_logits(q, k, encoding, layer) * factor[layer] for layer in range(layout.depth)]
        total = torch.cat(layers).sum(dim=0)
        sums.append(total if queries is coords else total.mT)
    features = torch.cat(sums, dim=1).detach()
    distances = torch.cdist(features, features, p=float("inf")).fill_diagonal_(float("inf"))
    first, second = divmod(int(distances.argmin()), len(coords))
    deviation = features.std(correction=0).clamp(min=1e-30)
    return float(distances[first, second] / deviation), coords[first], coords[second]


class _AttentionResult(NamedTuple):
    """Logits (H, N, N) and outputs (H, N, D) of each layer."""

    logits: list[Tensor]
    outputs: list[Tensor]


class _Probe:
    """Random tokens at positions of the training grid, and the attention between them."""

    def __init__(self, position: Position, layout: Layout, seed: int) -> None:
        self.position, self.layout = position, layout
        self.generator = torch.Generator().manual_seed(seed)
        cells = layout.coords().double()
        self.coords = cells[torch.randperm(len(cells), generator=self.generator)[:MAX_TOKENS]]
        self.extent = (cells.amax(dim=0) - cells.amin(dim=0)).clamp(min=1.0)
        self.x = torch.randn(1, len(self.coords), layout.width, generator=self.generator, dtype=torch.float64)
        shape = (3, layout.width, layout.width)
        self.weights = torch.randn(shape, generator=self.generator, dtype=torch.float64) / layout.width**0.5
        self.reference = self.attention(self.coords, torch.arange(len(self.coords)))

    @torch.no_grad()
    def attention(self, coords: Tensor, order: Tensor) -> _AttentionResult:
        """Attention between the tokens of the indices `order` (N,), at `coords` (N, A)."""
        x = _embedded(self.position, self.layout, self.x[:, order], coords)
        q, k, v = (_split_heads(x @ w, self.layout) for w in self.weights)
        encoding = self.position(coords)
        layers = range(self.layout.depth)
        return _AttentionResult(
            [_logits(q, k, encoding, layer) for layer in layers],
            [attend(q, k, v, encoding, layer)[0] for layer in layers],
        )

    def largest_change_by_shifts(self, times: int = 3) -> tuple[float, Tensor]:
        """The largest change of logits or outputs under random shifts, and its shift (A,)."""
        changes = []
        for _ in range(times):
            shift = torch.randn(len(self.extent), generator=self.generator, dtype=torch.float64) * self.extent
            shifted = self.attention(self.coords + shift, torch.arange(len(self.coords)))
            pairs = zip(
                [*self.reference.logits, *self.reference.outputs], [*shifted.logits, *shifted.outputs], strict=True
            )
            changes.append((max(_relative_change(a, b) for a, b in pairs), shift))
        return max(changes, key=lambda change: change[0])


def _embedded(position: Position, layout: Layout, x: Tensor, coords: Tensor) -> Tensor:
    """Tokens (1, N, C) with the embeddings that a scheme adds before each layer."""
    for layer in range(layout.depth if position.each_layer else 1):
        x = position.embed(x, coords, None, layer)
    return x


def _split_heads(x: Tensor, layout: Layout) -> Tensor:
    """(1, N, C) as (1, H, N, D)."""
    return x.unflatten(-1, (layout.heads, -1)).transpose(1, 2)


def _logits(q: Tensor, k: Tensor, encoding: Encoding, layer: int) -> Tensor:
    """Logits (H, N, M) up to a constant in each row: log of the outputs for one-hot values."""
    values = torch.eye(k.shape[2], dtype=k.dtype).expand(*k.shape[:2], -1, -1)
    return attend(q, k, values, encoding.logits_only(), layer)[0].clamp(min=1e-200).log()


def _relative_change(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors, divided by the standard deviation of the first."""
    return float((a - b).abs().max() / a.std().clamp(min=1e-30))


def _format(coords: Tensor) -> str:
    """Coordinates (A,) as text."""
    return "(" + ", ".join(f"{value:.3g}" for value in coords.tolist()) + ")"


def _scheme_and_layout(module: nn.Module, layout: Layout | None) -> tuple[Position, Layout]:
    """The position scheme of a module, and the layout that it was made for unless one is given."""
    position = module if isinstance(module, Position) else getattr(module, "position", None)
    if not isinstance(position, Position):
        raise TypeError(f"expected a position scheme, or a model with one as .position, got {type(module).__name__}")
    layout = layout or position.made_for
    if layout is None:
        raise ValueError(
            f"the layout of this {type(position).__name__} is unknown; give layout=Layout(width, heads, grid, depth), "
            f"or make the scheme with build(spec, layout)"
        )
    return position, layout
