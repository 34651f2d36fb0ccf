"""What happens to the channels of queries, keys, values or outputs of one attention call.

Tables that differ between layers are lists with one entry per layer, and lists of one entry where
layers share a table.

Shapes   B samples and H heads (1 if shared), N tokens, D channels of a head, R channel pairs,
         E appended channels
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..ops.tables import cos_sin
from .coords import check_axes

TABLES = 64 * 2**20  # bytes that the tables of all layers may take together; beyond, each layer makes its own
T = TypeVar("T")


class DeferredRotation(NamedTuple):
    """The inputs of a cos-sin table that attention makes itself, where tables for all layers at
    once would be too large.

    freqs (1, H, A, R), coords (N, A) or (B, N, A), and the grid whose cells they are, if any.
    """

    freqs: Tensor
    coords: Tensor
    grid: list[int] | None


class Transform(NamedTuple):
    """What happens to the channels of queries, keys, values or outputs, in this order.

    `basis`: matrices (B, N, H, D, E) that multiply the channels, or their diagonal blocks
    (B, N, H, S, b, c), or (H, D, E) where all tokens share one, also those without a position.
    `rotation`: cosines and sines (B, N, H, R, 2) in float32 that rotate R channel pairs, or
    `deferred`, the inputs to make them from. `extra`: channels (B, H, N, E) to append, whose
    products join the scaled logits.
    """

    basis: list[Tensor] | None = None
    rotation: list[Tensor] | None = None
    deferred: list[DeferredRotation] | None = None
    extra: list[Tensor] | None = None

    def rotates(self) -> bool:
        """Whether channel pairs rotate."""
        return len(self.rotation or self.deferred or ()) > 0  # dynamo of torch 2.9 has no bool() of a list

    def tables(self) -> list[Tensor]:
        """The cosines and sines (B, N, H, R, 2) of each layer, empty without a rotation."""
        return self.rotation or [cos_sin(*inputs)[0] for inputs in self.deferred or ()]

    def table(self, layer: int) -> Tensor | None:
        """The cosines and sines (B, N, H, R, 2) of one layer, made now if they were deferred; None
        without a rotation.
        """
        if self.deferred:
            return cos_sin(*entry(self.deferred, layer))[0]
        return entry(self.rotation, layer) if self.rotation else None

    def rounded(self, dtype: torch.dtype) -> "Transform":
        """The same with tables of cosines and sines in this dtype."""
        return self._replace(rotation=[table.to(dtype) for table in self.tables()], deferred=None)

    def combined(self, other: "Transform") -> "Transform":
        """Both transforms: rotations compose, appended channels are concatenated."""
        if self.rotates() and other.rotates():
            rotation, deferred = per_layer(_compose, self.tables(), other.tables()), None
        else:
            rotation, deferred = self.rotation or other.rotation, self.deferred or other.deferred
        extra = per_layer(_concatenate, self.extra, other.extra)
        return Transform(self.basis or other.basis, rotation, deferred, extra)

    def conflicts(self, other: "Transform") -> bool:
        """Whether the other transform would have to act in the basis that this one changes to."""
        return len(self.basis or ()) > 0 and (len(other.basis or ()) > 0 or other.rotates())

    def summary(self) -> str:
        """What happens to the channels, in a few words."""
        parts = ["a change of basis"] if self.basis else []
        parts += [f"rotation of {self.tables()[0].shape[-2]} pairs"] if self.rotation else []
        parts += [f"rotation of {self.deferred[0].freqs.shape[-1]} pairs"] if self.deferred else []
        parts += [f"{self.extra[0].shape[-1]} extra channels"] if self.extra else []
        return ", ".join(parts)


def entry(tables: Sequence[T], layer: int) -> T:
    """The entry of one layer in a list with one per layer, or one for all.

    Raises ValueError for a layer that does not exist.
    """
    if len(tables) > 1 and not 0 <= layer < len(tables):
        raise ValueError(f"layer {layer} does not exist: the encoding is for {len(tables)} layers, counted from 0")
    return tables[0 if len(tables) == 1 else layer]


def per_layer(function: Callable[[T, T], T], a: list[T] | None, b: list[T] | None) -> list[T] | None:
    """The function of both lists' entries, layer by layer, or the entries of one list where the
    other has none.
    """
    if not a or not b:
        return a or b
    return [function(entry(a, i), entry(b, i)) for i in range(max(len(a), len(b)))]


def _concatenate(a: Tensor, b: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return torch.cat((a.expand(*shape, -1), b.expand(*shape, -1)), dim=-1)


def _compose(a: Tensor, b: Tensor) -> Tensor:
    """One rotation after another: rotations of a pair commute, and their angles add."""
    if a.shape[-2] != b.shape[-2]:
        raise ValueError(f"rotations of {a.shape[-2]} and of {b.shape[-2]} pairs cannot be summed; give both as many")
    (ca, sa), (cb, sb) = a.unbind(-1), b.unbind(-1)
    return torch.stack((ca * cb - sa * sb, sa * cb + ca * sb), dim=-1)


def change_basis(x: Tensor, basis: Tensor, prefix: int, what: str) -> Tensor:
    """x (B, H, N, D) times matrices: one for all tokens, or one per token behind the prefix."""
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    basis = basis.to(precise)
    if basis.ndim == 3:
        return (x.to(precise) @ basis).to(x.dtype)
    check_tokens(prefix + basis.shape[1], x.shape[2], what)
    check_fits(basis.shape[0], basis.shape[2], x, what)
    patches = x[:, :, prefix:].to(precise)
    if basis.ndim == 5:
        patches = torch.einsum("bhnd,bnhde->bhne", patches, basis)
    else:
        blocks = patches.unflatten(-1, (basis.shape[3], -1))
        patches = torch.einsum("bhnsd,bnhsde->bhnse", blocks, basis).flatten(-2)
    return torch.cat((x[:, :, :prefix], patches.to(x.dtype)), dim=2)


def rotation_of(freqs: Tensor, coords: Tensor, grid: Sequence[int] | None = None) -> Transform:
    """Rotation by frequencies (L, H, A, R) at coords (N, A) or (B, N, A): tables, deferred if they
    are too large. Raises ValueError for a grid of another number of axes.
    """
    check_axes(grid, coords)
    if not torch.compiler.is_compiling() and len(freqs) > 1:
        layers, heads, _, pairs = freqs.shape
        if 2 * layers * heads * pairs * coords.shape[:-1].numel() * freqs.element_size() > TABLES:
            sizes = None if grid is None else list(grid)
            return Transform(deferred=[DeferredRotation(layer, coords, sizes) for layer in freqs.split(1)])
    return Transform(rotation=list(cos_sin(freqs, coords, grid).unbind(0)))


def check_fits(samples: int, heads: int, x: Tensor, what: str, shared: bool = False) -> None:
    """Raise ValueError unless tables of so many samples and heads (1 if shared) fit x (B, H, N, D).

    `shared` heads of keys and values may each serve a group of heads of the tables.
    """
    if samples not in (1, x.shape[0]):
        raise ValueError(
            f"the encoding is for a batch of {samples}, but there are {what} of {x.shape[0]} samples; "
            f"give position() the coordinates of these samples, or (tokens, axes) where they share them"
        )
    if heads not in (1, x.shape[1]) and not (shared and heads % x.shape[1] == 0):
        raise ValueError(
            f"the encoding is for {heads} heads, but there are {what} of {x.shape[1]}; "
            f"build the scheme with a Layout of {x.shape[1]} heads"
        )


def check_tokens(encoded: int, tokens: int, what: str) -> None:
    """Raise ValueError unless an encoding is for as many tokens as there are."""
    if encoded != tokens:
        raise ValueError(
            f"the encoding is for {encoded} tokens, but there are {tokens} {what}; "
            f"give position(coords, prefix=…) the number of tokens that have no position"
        )
