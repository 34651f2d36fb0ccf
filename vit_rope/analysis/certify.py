"""Certificates for position schemes, one's own or anyone's: that relative means relative, and that no place is lost.

Both look at a scheme from outside, through the attention that it gives to random contents in float64, and ask nothing
of how it works: `assert_relative(build("mixed", layout))`, `assert_reversible(MyScheme(layout), (14, 14), layout)`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..attention import attend
from ..positions import Encoding, Layout, Position

PLACES = 64  # as many tokens are looked at, at most


class CertificateError(AssertionError):
    """A scheme does not do what a certificate says; the message tells where and by how much."""


def assert_relative(module: nn.Module, layout: Layout | None = None, tolerance: float = 1e-5, seed: int = 0) -> float:
    """Certify that attention depends on displacements alone, and on nothing but coordinates: returns the error.

    `module` is a position scheme, or a model that has one as `.position`; one that was not made by `build` needs the
    `layout` that it was made for. Tokens without a place are left out: where a model has them, the origin matters.
    Raises CertificateError where shifting all coordinates, or reordering tokens together with theirs, changes logits
    or outputs by more than `tolerance` of their spread.
    """
    position, layout = _scheme(module, layout)
    view = _View(position, layout, seed)
    order = torch.randperm(len(view.coords), generator=view.generator)
    there = view.look(view.coords[order], order)
    error = max(_apart(a[..., order, :], b) for a, b in zip(view.here.outputs, there.outputs, strict=True))
    if error > tolerance:
        raise CertificateError(
            f"not a function of coordinates: tokens reordered together with theirs change their outputs by {error:.2g} "
            f"of the spread; derive every table from the coordinates that come with the call, not from their order"
        )
    error, shift = view.shifted()
    if error > tolerance:
        raise CertificateError(
            f"not relative: moving all tokens by {_places(shift)} changes logits or outputs by {error:.2g} of their "
            f"spread; rotations must commute, turn both partners of a pair by one angle, and act on queries and keys "
            f"alike (or set relative = False)"
        )
    return error


def assert_reversible(
    scheme: nn.Module, grid: tuple[int, ...], layout: Layout | None = None, tolerance: float = 1e-4, seed: int = 0
) -> float:
    """Certify that no two cells of a grid look the same to queries and keys: returns how far apart the nearest are.

    `scheme` and `layout` are as in `assert_relative`. Two places look the same if equal contents there give and get
    equal attention, to and from everywhere, in all heads and layers. Raises CertificateError where the logits of two
    places differ by less than `tolerance` of the spread.
    """
    position, layout = _scheme(scheme, layout)
    margin, one, two = nearest(position, layout, layout.coords(grid).double(), seed)
    if margin < tolerance:
        raise CertificateError(
            f"not reversible: places {_places(one)} and {_places(two)} look the same to every query and key, logits "
            f"differ by {margin:.2g} of their spread; frequencies must tell all axes apart and repeat on no grid point"
        )
    return margin


def relativity_error(module: nn.Module, layout: Layout | None = None, seed: int = 0) -> float:
    """How much shifting all coordinates changes logits or outputs, as a part of their spread: the largest of all seen.

    0 for relative schemes, up to rounding. Arguments are as in `assert_relative`.
    """
    return _View(*_scheme(module, layout), seed).shifted()[0]


def nearest(position: Position, layout: Layout, coords: Tensor, seed: int = 0) -> tuple[float, Tensor, Tensor]:
    """The two of the places (N, A) that look most alike, and how far apart their logits are as a part of the spread.

    Logits of all layers and heads are added up with random factors, which hides no difference but by a rare chance.
    """
    generator = torch.Generator().manual_seed(seed)
    others = coords[torch.randperm(len(coords), generator=generator)[:PLACES]]
    content = torch.randn(layout.width, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, layout.width, layout.width, generator=generator, dtype=torch.float64) / layout.width**0.5
    factors = torch.randn(2, layout.depth, layout.heads, 1, 1, generator=generator, dtype=torch.float64)
    seen = []  # (N, M) of logits to and from each place
    for (queries, keys), factor in zip(((coords, others), (others, coords)), factors, strict=True):
        encoding = position(queries, key_coords=keys)
        q, k = (
            _heads(_embedded(position, layout, content.expand(1, len(c), -1), c) @ w, layout)
            for c, w in zip((queries, keys), weights, strict=True)
        )
        layers = [_logits(q, k, encoding, layer) * factor[layer] for layer in range(layout.depth)]
        mixed = torch.cat(layers).sum(dim=0)
        seen.append(mixed if queries is coords else mixed.mT)
    looks = torch.cat(seen, dim=1).detach()
    apart = torch.cdist(looks, looks, p=float("inf")).fill_diagonal_(float("inf"))
    one, two = divmod(int(apart.argmin()), len(coords))
    return float(apart[one, two] / looks.std(correction=0).clamp(min=1e-30)), coords[one], coords[two]


class _Seen(NamedTuple):
    """Logits (H, N, N) and outputs (H, N, D) of each layer."""

    logits: list[Tensor]
    outputs: list[Tensor]


class _View:
    """Random tokens at places of the training grid, and what attention makes of them."""

    def __init__(self, position: Position, layout: Layout, seed: int) -> None:
        self.position, self.layout = position, layout
        self.generator = torch.Generator().manual_seed(seed)
        cells = layout.coords().double()
        self.coords = cells[torch.randperm(len(cells), generator=self.generator)[:PLACES]]
        self.extent = (cells.amax(dim=0) - cells.amin(dim=0)).clamp(min=1.0)
        self.x = torch.randn(1, len(self.coords), layout.width, generator=self.generator, dtype=torch.float64)
        shape = (3, layout.width, layout.width)
        self.weights = torch.randn(shape, generator=self.generator, dtype=torch.float64) / layout.width**0.5
        self.here = self.look(self.coords, torch.arange(len(self.coords)))

    @torch.no_grad()
    def look(self, coords: Tensor, order: Tensor) -> _Seen:
        """Attention among the tokens in an order, at coordinates (N, A)."""
        x = _embedded(self.position, self.layout, self.x[:, order], coords)
        q, k, v = (_heads(x @ w, self.layout) for w in self.weights)
        encoding = self.position(coords)
        layers = range(self.layout.depth)
        return _Seen(
            [_logits(q, k, encoding, layer) for layer in layers],
            [attend(q, k, v, encoding, layer)[0] for layer in layers],
        )

    def shifted(self, times: int = 3) -> tuple[float, Tensor]:
        """The largest change of logits or outputs by shifts, and its shift."""
        found = []
        for _ in range(times):
            shift = torch.randn(len(self.extent), generator=self.generator, dtype=torch.float64) * self.extent
            there = self.look(self.coords + shift, torch.arange(len(self.coords)))
            pairs = zip([*self.here.logits, *self.here.outputs], [*there.logits, *there.outputs], strict=True)
            found.append((max(_apart(a, b) for a, b in pairs), shift))
        return max(found, key=lambda pair: pair[0])


def _embedded(position: Position, layout: Layout, x: Tensor, coords: Tensor) -> Tensor:
    """Tokens (1, N, C) that a scheme has placed before all layers that it acts before."""
    for layer in range(layout.depth if position.each_layer else 1):
        x = position.embed(x, coords, None, layer)
    return x


def _heads(x: Tensor, layout: Layout) -> Tensor:
    return x.unflatten(-1, (layout.heads, -1)).transpose(1, 2)


def _logits(q: Tensor, k: Tensor, encoding: Encoding, layer: int) -> Tensor:
    """Logits (H, N, M) up to a constant in each row, read off the weights on one-hot values."""
    values = torch.eye(k.shape[2], dtype=k.dtype).expand(*k.shape[:2], -1, -1)
    return attend(q, k, values, encoding.logits_only(), layer)[0].clamp(min=1e-200).log()


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.std().clamp(min=1e-30))


def _places(place: Tensor) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in place.tolist()) + ")"


def _scheme(module: nn.Module, layout: Layout | None) -> tuple[Position, Layout]:
    position = module if isinstance(module, Position) else getattr(module, "position", None)
    if not isinstance(position, Position):
        raise TypeError(f"expected a position scheme, or a model with one as .position, got {type(module).__name__}")
    layout = layout or position.made_for
    if layout is None:
        raise ValueError(
            f"which model is this {type(position).__name__} for? give layout=Layout(width, heads, grid, depth), "
            f"or make it by build(spec, layout)"
        )
    return position, layout
