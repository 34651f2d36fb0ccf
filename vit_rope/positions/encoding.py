"""What positions do to one attention call: plain tensors for all layers, made once a forward pass.

Only `vit_rope.attention` reads these records. Every base value means that there is nothing to do. Tables that differ
from layer to layer are lists with an entry for each layer, and lists of one where layers share, so that a gradient
flows back into each layer's own. Records are pytrees, which pass through checkpointing, compilers, exporters and
processes; TorchScript, which must be able to carry them, takes away methods, so they have none.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.tables import cos_sin

T = TypeVar("T")
ActsOn = Literal["q", "k", "v", "logits"]


class DeferredRotation(NamedTuple):
    """What a table of turns is made of by attention itself, where tables for all layers at once would be too large.

    freqs (1, H, A, R), coords (N, A) or (B, N, A), and the grid that they are the whole of, if any.
    """

    freqs: Tensor
    coords: Tensor
    grid: list[int] | None


class Transform(NamedTuple):
    """What happens to the queries, keys or values of an attention, or to its output, in this order.

    `basis`: matrices (B, N, H, D, E) that channels are multiplied by, or blocks on their diagonals (B, N, H, S, b, c);
    (H, D, E) where all tokens share one, also those without a place. `turn`: cosines and sines (B, N, H, R, 2) in
    float32 by which R channel pairs turn; or `angles`, of which to make them. `extra`: channels (B, H, N, E) beside;
    their products join the scaled logits. B and H are 1 where samples or heads share.
    """

    basis: list[Tensor] | None = None
    turn: list[Tensor] | None = None
    angles: list[DeferredRotation] | None = None
    extra: list[Tensor] | None = None


class RelativeTerm(NamedTuple):
    """A term that a pair of tokens looks up: r_ij is row index_ij (B or 1, N, M) of a table (H or 1, T, D), 0 for T.

    `acts_on` "q": q_i · r_ij joins the logits, scaled as q · k is; "k": k_j · r_ij does; "v": the output of token i gains
    sum_j a_ij r_ij, of attention weights a; "logits": r_ij itself joins the logits, of a table one channel wide.
    """

    table: Tensor
    index: Tensor
    acts_on: ActsOn


class Encoding(NamedTuple):
    """What positions do to one attention call; the default does nothing.

    `q`, `k`, `v`, `out`: what happens to queries, keys (as to queries, if None), values and outputs. `bias` (B, H, N,
    M): added to the scaled logits. `terms`: what pairs look up, for each layer, at that layer alone. `scale`: a factor
    on the product of queries and keys beside 1 / sqrt(D). `polar`: channels are moduli (softplus) of pairs that only a
    turn gives a phase. `stride`: how far the partners of a pair are apart (1 interleaved, R half). `prefix`: how many
    queries and keys in front have no place; tables have no rows for them, biases and indices do.
    """

    q: Transform = Transform()
    k: Transform | None = None
    v: Transform = Transform()
    out: Transform = Transform()
    bias: list[Tensor] | None = None
    terms: list[list[RelativeTerm]] | None = None
    scale: float = 1.0
    polar: bool = False
    stride: int = 1
    prefix: tuple[int, int] = (0, 0)


def rotates_only(encoding: Encoding) -> bool:
    """Whether queries and keys turn alike, and nothing else happens to them or to values and outputs."""
    q, k, v, out = encoding[:4]
    other = (q.basis, q.extra, *v, *out, content_terms(encoding), encoding.polar)
    return k is None and _turns(q) and not any(other)


def content_terms(encoding: Encoding) -> list[RelativeTerm]:
    """The terms, of all layers, for which the content of tokens counts."""
    return [term for layer in encoding.terms or [] for term in layer if term.acts_on != "logits"]


def bias_at(encoding: Encoding, layer: int = 0) -> Tensor | None:
    """What place alone adds to the scaled logits (B, H, N, M) of a layer, if anything."""
    found = encoding.bias[layer % len(encoding.bias)] if encoding.bias else None
    for table, index, acts_on in encoding.terms[layer % len(encoding.terms)] if encoding.terms else []:
        if acts_on == "logits":
            index = index if index.ndim == 3 else index[None]
            values = F.pad(table[..., 0], (0, 1)).index_select(-1, index.flatten())  # (H, B · N · M)
            values = values.unflatten(-1, index.shape).transpose(0, 1)
            found = values if found is None else found + values
    return found


def after(encoding: Encoding, prefix: int, key_prefix: int) -> Encoding:
    """The encoding of tokens behind others that have no place: for those no turn, no bias, no term."""
    if prefix == key_prefix == 0:
        return encoding
    pad = (key_prefix, 0, prefix, 0)
    bias = encoding.bias and [F.pad(table, pad) for table in encoding.bias]
    terms = encoding.terms and [[_pad(term, pad) for term in layer] for layer in encoding.terms]
    k = encoding.q if encoding.k is None and prefix != key_prefix else encoding.k
    return encoding._replace(k=k, bias=bias, terms=terms, prefix=(prefix, key_prefix))


def _pad(term: RelativeTerm, pad: tuple[int, ...]) -> RelativeTerm:
    none = term.table.shape[-2]  # padded as 0, for a value to pad with would be a constant of a compiled graph
    return term._replace(index=F.pad(term.index - none, pad) + none)


def combine(a: Encoding, b: Encoding) -> Encoding:
    """Both at once: turns compose, biases, terms and channels beside add up, scales multiply.

    Raises ValueError where the two cannot act on the same channels.
    """
    rotating = [part for part in (a, b) if _turns(part.q) or _turns(part.v)]
    if len({part.stride for part in rotating}) > 1:
        raise ValueError("rotations of interleaved and of half pairs do not commute; give both the same `pairs`")
    if a.polar or b.polar or _mixes(a, b) or _mixes(b, a):
        raise ValueError("schemes that remake the channels of queries and keys cannot be summed with other rotations")
    k = None
    if a.k is not None or b.k is not None:
        k = _both(a.q if a.k is None else a.k, b.q if b.k is None else b.k)
    return Encoding(
        _both(a.q, b.q),
        k,
        _both(a.v, b.v),
        _both(a.out, b.out),
        each(torch.add, a.bias, b.bias),
        each(lambda s, t: [*s, *t], a.terms, b.terms),
        a.scale * b.scale,
        stride=rotating[0].stride if rotating else 1,
    )


def each(function: Callable[[T, T], T], a: list[T] | None, b: list[T] | None) -> list[T] | None:
    """The function of both lists' entries layer by layer, or the entries of one where the other has none."""
    if not a or not b:
        return a or b
    return [function(a[i % len(a)], b[i % len(b)]) for i in range(max(len(a), len(b)))]


def tables(side: Transform) -> list[Tensor]:
    """The turns (B, N, H, R, 2) of each layer, made where only their angles are known."""
    return side.turn or [cos_sin(*angles)[0] for angles in side.angles or ()]


def _turns(side: Transform) -> bool:
    return len(side.turn or side.angles or ()) > 0  # not bool(): dynamo of torch 2.9 takes none of a list


def _mixes(a: Encoding, b: Encoding) -> bool:
    return len(a.q.basis or ()) > 0 and (len(b.q.basis or ()) > 0 or _turns(b.q))


def _both(a: Transform, b: Transform) -> Transform:
    if _turns(a) and _turns(b):
        turn, angles = each(_compose, tables(a), tables(b)), None
    else:
        turn, angles = a.turn or b.turn, a.angles or b.angles
    return Transform(a.basis or b.basis, turn, angles, each(_beside, a.extra, b.extra))


def _beside(a: Tensor, b: Tensor) -> Tensor:
    shape = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return torch.cat((a.expand(*shape, -1), b.expand(*shape, -1)), dim=-1)


def _compose(a: Tensor, b: Tensor) -> Tensor:
    """One turn after another: turns of a pair commute and their angles add."""
    if a.shape[-2] != b.shape[-2]:
        raise ValueError(f"rotations of {a.shape[-2]} and of {b.shape[-2]} pairs cannot be summed")
    (ca, sa), (cb, sb) = a.unbind(-1), b.unbind(-1)
    return torch.stack((ca * cb - sa * sb, sa * cb + ca * sb), dim=-1)
