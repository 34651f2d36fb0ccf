"""What positions do to one attention call: a record of tensors for all layers, made once per
forward pass.

A scheme makes an `Encoding`, attention calls its methods, and no other code interprets it. Every
default means that there is nothing to do. Tables that differ between layers are lists with one
entry per layer, and lists of one entry where layers share a table, so that a gradient flows back
into each layer's own parameters. Records are pytrees: they pass through activation checkpointing,
compilers, exporters and processes.

Shapes   B samples and H heads (1 if shared), N queries, M keys, D channels of a head, R channel
         pairs, E appended channels, T rows of a table
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.eager import accumulation_dtype
from ..ops.rotate import rotate
from .transform import Transform, change_basis, check_fits, check_tokens, entry, per_layer

Side = Literal["q", "k", "v", "out"]
ActsOn = Literal["q", "k", "v", "logits"]
NAMES = {"q": "queries", "k": "keys", "v": "values", "out": "outputs"}


class RelativeTerm(NamedTuple):
    """A term that each pair of tokens looks up: r_ij is row index_ij (B or 1, N, M) of a table (H
    or 1, T, D), or 0 where the index is T.

    `acts_on` "q": q_i · r_ij joins the logits, scaled like q · k. "k": k_j · r_ij does. "v": the
    output of token i gains sum_j a_ij r_ij with attention weights a. "logits": r_ij itself joins
    the scaled logits, from a table with one channel.
    """

    table: Tensor
    index: Tensor
    acts_on: ActsOn

    def products(self, x: Tensor) -> Tensor:
        """x_i · r_ij (B, H, N, M) of x (B, H, N, D): one product per row of the table, which pairs
        then look up.
        """
        products = F.pad(x @ self.table.to(x.dtype).transpose(-2, -1), (0, 1))  # (B, H, N, T + 1)
        return products.gather(-1, self._indices()[:, None].expand(*products.shape[:3], -1))

    def values(self) -> Tensor:
        """r_ij (B or 1, H or 1, N, M) of a table with one channel."""
        index = self._indices()
        values = F.pad(self.table[..., 0], (0, 1)).index_select(-1, index.flatten())  # (H, B · N · M)
        return values.unflatten(-1, index.shape).transpose(0, 1)

    def mixture(self, weights: Tensor) -> Tensor:
        """sum_j a_ij r_ij (B, H, N, D) of attention weights a (B, H, N, M)."""
        rows = self.table.shape[-2]
        sums = weights.new_zeros(*weights.shape[:3], rows + 1)
        sums = sums.scatter_add(-1, self._indices()[:, None].expand_as(weights), weights)
        return sums[..., :rows] @ self.table.to(weights.dtype)

    def transposed(self) -> "RelativeTerm":
        """The same term as keys see it: the index is (B or 1, M, N)."""
        return self._replace(index=self.index.transpose(-2, -1))

    def padded(self, pad: tuple[int, ...]) -> "RelativeTerm":
        """The term behind tokens without a position, whose pairs have a term of 0."""
        absent = self.table.shape[-2]  # subtracted first: a padding value would be a constant of a compiled graph
        return self._replace(index=F.pad(self.index - absent, pad) + absent)

    def _indices(self) -> Tensor:
        return self.index if self.index.ndim == 3 else self.index[None]


class Encoding(NamedTuple):
    """What positions do to one attention call; the default does nothing.

    `q`, `k`, `v`, `out`: transforms of queries, keys (that of queries if None), values and outputs.
    `biases` (B, H, N, M): added to the scaled logits. `term_lists`: what pairs look up, a list per
    layer. `scale`: a factor on the product of queries and keys in addition to 1 / sqrt(D). `polar`:
    each channel of queries and keys becomes a pair with modulus softplus(x) and a phase that only
    the rotation gives. `stride`: the distance between the partners of a pair (1 interleaved, R
    half). `prefix`: how many queries and keys at the front have no position; rotations and bases
    have no rows for them, biases and indices do.
    """

    q: Transform = Transform()
    k: Transform | None = None
    v: Transform = Transform()
    out: Transform = Transform()
    biases: list[Tensor] | None = None
    term_lists: list[list[RelativeTerm]] | None = None
    scale: float = 1.0
    polar: bool = False
    stride: int = 1
    prefix: tuple[int, int] = (0, 0)

    def __repr__(self) -> str:
        sides = {"q": self.q, "k": self.k or Transform(), "v": self.v, "out": self.out}
        parts = [f"{side}: {transform.summary()}" for side, transform in sides.items() if any(transform)]
        counts = {"bias": len(self.biases or ()), "terms": len(self.term_lists or ())}
        parts += [f"{name} of {count} layer(s)" for name, count in counts.items() if count]
        parts += [f"scale {self.scale:.4g}"] if self.scale != 1 else []
        parts += [f"prefix {self.prefix[0]}, {self.prefix[1]}"] if any(self.prefix) else []
        return f"Encoding({'; '.join(parts)})"

    # ---- what attention asks --------------------------------------------------------------

    def transform(self, side: Side) -> Transform:
        """What happens to one side of attention."""
        if side == "q" or (side == "k" and self.k is None):
            return self.q
        return self.out if side == "out" else self.v if side == "v" else self.k or Transform()

    def rotation(self, layer: int = 0, side: Side = "q") -> Tensor | None:
        """The cosines and sines (B, N, H, R, 2) that rotate one side at a layer, if it rotates."""
        return self.transform(side).table(layer)

    def terms(self, layer: int, *acts_on: ActsOn) -> list[RelativeTerm]:
        """The terms of a layer that act on these, or all of them."""
        terms = entry(self.term_lists, layer) if self.term_lists else []
        return [term for term in terms if not acts_on or term.acts_on in acts_on]

    def bias(self, layer: int = 0) -> Tensor | None:
        """What positions add to the scaled logits (B, H, N, M) of a layer without content."""
        total = entry(self.biases, layer) if self.biases else None
        for term in self.terms(layer, "logits"):
            total = term.values() if total is None else total + term.values()
        return total

    def added_logits(self, q: Tensor, k: Tensor, layer: int, scale: float) -> Tensor | None:
        """All that positions add to the scaled logits (B, H, N, M) of q (B, H, N, D) and k (B, H,
        M, D), if anything.

        Raises ValueError where the tables are for another number of tokens, heads or samples.
        """
        for table in (*(self.biases or ()), *(term.index for term in self.terms(layer))):
            check_tokens(table.shape[-2], q.shape[2], "queries")
            check_tokens(table.shape[-1], k.shape[2], "keys")
        total = self.bias(layer)
        if total is not None:
            check_fits(total.shape[0], total.shape[1], q, "queries")
        for term in self.terms(layer, "q", "k"):
            if term.acts_on == "q":
                logits = term.products(q) * scale
            else:
                logits = term.transposed().products(k).transpose(-2, -1) * scale
            total = logits if total is None else total + logits
        return total

    def reads_content(self) -> bool:
        """Whether terms of any layer depend on the content of tokens."""
        return any(term.acts_on != "logits" for terms in self.term_lists or [] for term in terms)

    def rotates_only(self) -> bool:
        """Whether queries and keys rotate alike, and values, outputs and channels otherwise stay as
        they are.
        """
        others = (self.q.basis, self.q.extra, *self.v, *self.out)
        return self.k is None and self.q.rotates() and not (any(others) or self.polar or self.reads_content())

    def apply(self, side: Side, x: Tensor, layer: int = 0, overwrite: bool = False) -> Tensor:
        """x (B, H, N, D), one side of attention, transformed; `overwrite` allows the result to lie
        where x does.

        Appended channels are left to `append`. Raises ValueError where the tables are for another
        number of tokens, heads or samples.
        """
        transform, prefix = self.transform(side), self.prefix[side in ("k", "v")]
        if self.polar and side in ("q", "k"):
            modulus = F.softplus(x.to(accumulation_dtype(x))).to(x.dtype)
            x = torch.stack((modulus, torch.zeros_like(modulus)), dim=-1).flatten(-2)
        if transform.basis:
            x = change_basis(x, entry(transform.basis, layer), prefix, NAMES[side])
        table = self.rotation(layer, side)
        if table is not None:
            check_tokens(prefix + table.shape[1], x.shape[2], NAMES[side])
            check_fits(table.shape[0], table.shape[2], x, NAMES[side], shared=side in ("k", "v"))
            if table.shape[2] > x.shape[1]:  # keys shared by heads of queries that each rotate differently
                x = x.repeat_interleave(table.shape[2] // x.shape[1], dim=1)
            x = rotate(x, table, self.stride, prefix, overwrite and not transform.basis)
        return x

    def append(self, side: Side, x: Tensor, layer: int) -> Tensor:
        """x (B, H, N, D) with extra channels (B, H, N, E), zero for tokens without a position.

        Raises ValueError where they are for another number of tokens, heads or samples.
        """
        extra = self.extra(side, layer)
        if extra is None:
            return x
        extra = F.pad(extra.to(x.dtype), (0, 0, self.prefix[side == "k"], 0))
        check_tokens(extra.shape[2], x.shape[2], NAMES[side])
        check_fits(extra.shape[0], extra.shape[1], x, NAMES[side])
        return torch.cat((x, extra.expand(*x.shape[:-1], -1)), dim=-1)

    def extra(self, side: Side, layer: int = 0) -> Tensor | None:
        """The channels (B, H, N, E) that `append` appends to a side at a layer, if any."""
        extra = self.transform(side).extra
        return entry(extra, layer) if extra else None

    def adds_logits(self) -> bool:
        """Whether positions add anything to the logits."""
        return any(len(tables or ()) > 0 for tables in (self.biases, self.term_lists, self.q.extra))

    # ---- how encodings are made -----------------------------------------------------------

    def behind(self, prefix: int, key_prefix: int) -> "Encoding":
        """The encoding of tokens behind others without a position, for which nothing rotates and
        nothing is added. Raises ValueError for a negative number of them.
        """
        if prefix < 0 or key_prefix < 0:
            raise ValueError(
                f"the number of tokens without a position must be 0 or more, got {prefix} and {key_prefix}"
            )
        if prefix == key_prefix == 0:
            return self
        pad = (key_prefix, 0, prefix, 0)
        biases = self.biases and [F.pad(table, pad) for table in self.biases]
        terms = self.term_lists and [[term.padded(pad) for term in layer] for layer in self.term_lists]
        k = self.q if self.k is None and prefix != key_prefix else self.k
        return self._replace(k=k, biases=biases, term_lists=terms, prefix=(prefix, key_prefix))

    def logits_only(self) -> "Encoding":
        """The encoding without what it does to values and outputs."""
        terms = self.term_lists and [[term for term in layer if term.acts_on != "v"] for layer in self.term_lists]
        return self._replace(v=Transform(), out=Transform(), term_lists=terms)

    def combined(self, other: "Encoding") -> "Encoding":
        """Both encodings: rotations compose, biases, terms and extra channels add up, scales
        multiply.

        Raises ValueError where the two cannot act on the same channels.
        """
        rotating = [each for each in (self, other) if each.q.rotates() or each.v.rotates()]
        if len({each.stride for each in rotating}) > 1:
            raise ValueError("rotations of interleaved and of half pairs do not commute; give both the same `pairs`")
        for each, rest in ((self, other), (other, self)):
            if each.q.conflicts(rest.q) or (each.polar and (rest.q.rotates() or rest.q.basis or rest.polar)):
                raise ValueError(
                    "schemes that remake the channels of queries and keys cannot be summed with rotations or with each "
                    "other; keep one of them"
                )
        separate_keys = self.k is not None or other.k is not None
        return Encoding(
            self.q.combined(other.q),
            self.transform("k").combined(other.transform("k")) if separate_keys else None,
            self.v.combined(other.v),
            self.out.combined(other.out),
            per_layer(torch.add, self.biases, other.biases),
            per_layer(lambda some, more: [*some, *more], self.term_lists, other.term_lists),
            self.scale * other.scale,
            self.polar or other.polar,
            stride=rotating[0].stride if rotating else 1,
        )
