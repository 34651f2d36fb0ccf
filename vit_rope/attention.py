"""Attention under a position encoding: the one place where queries, keys and values meet positions.

A position scheme is a function of coordinates. Attention asks it what to do and never asks which scheme it is.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _global_forward_hooks

from .ops.rotate import rotate, rotate_groups
from .ops.tables import cos_sin
from .positions.encoding import Encoding, RelativeTerm, Transform, bias_at, content_terms, rotates_only

T = TypeVar("T")


@torch.fx.wrap
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    encoding: Encoding,
    layer: int = 0,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    fused: bool = True,
    overwrite: bool = False,
) -> Tensor:
    """Softmax attention (B, H, N, D) of queries (B, H, N, D) over keys and values (B, H, M, D) with their positions.

    `mask`, broadcastable to (B, H, N, M), is True where a query may look or is added to the scaled logits; `causal`
    hides later keys. An encoding without a bias leaves the mask as it is, so that flash kernels stay. `fused=False`
    spells the softmax out, for exporters. `overwrite` gives q and k away: they may be rotated where they lie. Keys and
    values of fewer heads serve several heads of queries each. Raises ValueError where the encoding is of another number
    of tokens, or mask and causal are both given.
    """
    if causal and mask is not None:
        raise ValueError("attend takes a mask or causal=True, not both; put the causal part into the mask")
    width, scale = v.shape[-1], q.shape[-1] ** -0.5 * encoding.scale
    terms = _entry(encoding.terms, layer) if encoding.terms else ()
    bias = _bias(q, k, encoding, terms, scale, layer)
    if bias is not None:
        mask, causal = _with_mask(bias.to(v.dtype), mask, causal), False
    transform_k, overwrite = encoding.q if encoding.k is None else encoding.k, overwrite and not content_terms(encoding)
    q = _placed(q, encoding.q, encoding, layer, encoding.prefix[0], "queries", overwrite)
    k = _placed(k, transform_k, encoding, layer, encoding.prefix[1], "keys", overwrite)
    v = _turned(v, encoding.v, encoding.stride, layer, encoding.prefix[1], "values")
    if k.shape[1] != v.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if encoding.q.extra:
        extra_q, extra_k = _entry(encoding.q.extra, layer), _entry(transform_k.extra or [], layer)
        q, k = _beside(q * scale, extra_q, encoding.prefix[0]), _beside(k, extra_k, encoding.prefix[1])
        v, scale = F.pad(v, (0, extra_q.shape[-1])), 1.0  # flash kernels want heads of one width
    q, k = q.to(v.dtype), k.to(v.dtype)
    values = [term for term in terms if term.acts_on == "v"]
    if fused and not values:
        shared = not torch.jit.is_tracing() and q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=shared)
    else:
        out = _spelled_out(q, k, v, mask, causal, dropout, scale, values)
    return _turned(out[..., :width], encoding.out, encoding.stride, layer, encoding.prefix[0], "outputs")


@torch.fx.wrap
def attend_qkv(
    qkv: Tensor,
    heads: int,
    encoding: Encoding,
    layer: int = 0,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    fused: bool = True,
    overwrite: bool = False,
) -> Tensor:
    """The attention (B, H, N, D) of `attend`, straight from a projection qkv (B, N, 3·H·D).

    Where queries and keys turn alike, one product turns both, and their gradients are written straight into that of the
    projection. Raises ValueError where qkv does not divide into queries, keys and values of this many heads.
    """
    if qkv.shape[-1] % (3 * heads):
        raise ValueError(f"{qkv.shape[-1]} channels do not divide into queries, keys and values of {heads} heads")
    groups = qkv.unflatten(-1, (3, heads, -1))
    if rotates_only(encoding):
        prefix = encoding.prefix[0]
        turn = _table(encoding.q, layer, prefix, groups.shape[1], "queries")
        q, k, v = rotate_groups(groups, turn, 2, encoding.stride, prefix, overwrite)
        encoding = encoding._replace(q=Transform())
    else:
        q, k, v = groups.transpose(1, 3).unbind(2)
        overwrite = False  # of several views of one tensor autograd lets none be overwritten
    return attend(q, k, v, encoding, layer, mask, causal, dropout, fused, overwrite)


@torch.fx.wrap
def attend_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    encoding: Encoding,
    layer: int = 0,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Linear attention (B, H, N, E) of queries (B, H, N, D) over keys (B, H, M, D) and values (B, H, M, E), turned.

    out_i = sum_j (R_i f(q_i)) · (R_j f(k_j)) v_j / sum_j f(q_i) · f(k_j) with features f = elu + 1 (arXiv:2006.16236):
    positions turn the numerator alone, for what it is divided by must stay positive (RoFormer, arXiv:2104.09864,
    section 3.3). `mask` (…, 1, M) is True for keys that may be seen. Raises ValueError for any other mask, for causal
    attention, and for an encoding that `check_linear` refuses.
    """
    if causal or (mask is not None and (mask.dtype != torch.bool or mask.ndim < 2 or mask.shape[-2] != 1)):
        raise ValueError(
            "linear attention sums the keys once for all queries, so it cannot be causal, "
            "and takes a mask of keys alone: True for those to see, of shape (…, 1, keys)"
        )
    precise = torch.float64 if v.dtype == torch.float64 else torch.float32
    q, k = (F.elu(t.to(precise)) + 1 for t in (q, k))
    k = k / k.shape[2]  # a mean, for sums over many keys leave the range of float16
    if mask is not None:
        k = k * mask.transpose(-2, -1)
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    q = q / (q * k.sum(dim=2, keepdim=True)).sum(dim=-1, keepdim=True)
    return attend_features(q.to(v.dtype), k.to(v.dtype), v, encoding, layer)


def attend_features(q: Tensor, k: Tensor, v: Tensor, encoding: Encoding, layer: int = 0) -> Tensor:
    """The numerator of linear attention, of queries and keys that have their features and are normalised already.

    Temperatures of an encoding do nothing here: they would scale the weights and their sum alike. Raises ValueError for
    an encoding that `check_linear` refuses.
    """
    check_linear(encoding)
    transform_k = encoding.q if encoding.k is None else encoding.k
    q = _placed(q, encoding.q, encoding, layer, encoding.prefix[0], "queries", False)
    k = _placed(k, transform_k, encoding, layer, encoding.prefix[1], "keys", False)
    v = _turned(v, encoding.v, encoding.stride, layer, encoding.prefix[1], "values")
    out = q @ (k.transpose(-2, -1) @ v)
    return _turned(out, encoding.out, encoding.stride, layer, encoding.prefix[0], "outputs")


def check_linear(encoding: Encoding) -> None:
    """Raise ValueError for an encoding of which linear attention could only do a part."""
    if encoding.bias or encoding.terms or encoding.q.extra:
        raise ValueError("linear attention has no logits, so a scheme that adds a bias to them cannot place it")
    if encoding.polar:
        raise ValueError("linear attention has features of its own, so a scheme that makes others cannot place it")


def has_no_hooks(*projections: nn.Module) -> bool:
    """Whether nobody but attention sees what these modules give: a hook may keep it, as DINO's readers of keys do."""
    return not (_global_forward_hooks or any(module._forward_hooks for module in projections))


# ---- what positions do to one side ----------------------------------------------------------------------------------
def _placed(
    x: Tensor, side: Transform, encoding: Encoding, layer: int, prefix: int, what: str, overwrite: bool = False
) -> Tensor:
    """Queries or keys (B, H, N, D) with their places in them."""
    if encoding.polar:  # each channel becomes a pair: its modulus, and a phase for the turn to give
        modulus = F.softplus(x.float()).to(x.dtype)
        x = torch.stack((modulus, torch.zeros_like(modulus)), dim=-1).flatten(-2)
    return _turned(x, side, encoding.stride, layer, prefix, what, overwrite)


def _turned(
    x: Tensor, side: Transform, stride: int, layer: int, prefix: int, what: str, overwrite: bool = False
) -> Tensor:
    if side.basis:
        x = _in_basis(x, _entry(side.basis, layer), prefix, what)
    if side.turn or side.angles:
        turn = _table(side, layer, prefix, x.shape[2], what)
        if turn.shape[2] > x.shape[1]:  # keys shared by heads of queries that each turn their own way
            x = x.repeat_interleave(turn.shape[2] // x.shape[1], dim=1)
        x = rotate(x, turn, stride, prefix, overwrite and not side.basis)
    return x


def _in_basis(x: Tensor, basis: Tensor, prefix: int, what: str) -> Tensor:
    """x (B, H, N, D) times matrices: one for all tokens, or each its own but for the prefix."""
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    basis = basis.to(precise)
    if basis.ndim == 3:
        return (x.to(precise) @ basis).to(x.dtype)
    _check(basis.shape[1], prefix, x.shape[2], what)
    placed = x[:, :, prefix:].to(precise)
    if basis.ndim == 5:
        placed = torch.einsum("bhnd,bnhde->bhne", placed, basis)
    else:
        blocks = placed.unflatten(-1, (basis.shape[3], -1))
        placed = torch.einsum("bhnsd,bnhsde->bhnse", blocks, basis).flatten(-2)
    return torch.cat((x[:, :, :prefix], placed.to(x.dtype)), dim=2)


def _beside(x: Tensor, extra: Tensor, prefix: int) -> Tensor:
    """x (B, H, N, D) with channels (B, H, N, E) beside, which are zero for tokens without a place."""
    extra = F.pad(extra.to(x.dtype), (0, 0, prefix, 0))
    return torch.cat((x, extra.expand(*x.shape[:-1], -1)), dim=-1)


def _table(side: Transform, layer: int, prefix: int, tokens: int, what: str) -> Tensor:
    """The turns (B, N, H, R, 2) of one layer, checked to speak of all tokens."""
    table = _entry(side.turn, layer) if side.turn else cos_sin(*_entry(side.angles or [], layer))[0]
    _check(table.shape[1], prefix, tokens, what)
    return table


def _entry(tables: Sequence[T], layer: int) -> T:
    """The entry for one layer of tables that have one for each, or one for all."""
    return tables[layer % len(tables)]


def _check(placed: int, prefix: int, tokens: int, what: str) -> None:
    if prefix + placed != tokens:
        raise ValueError(
            f"the encoding places {prefix + placed} tokens, but there are {tokens} {what}; "
            f"give position(coords, prefix=…) the number of tokens that have no place"
        )


# ---- logits ---------------------------------------------------------------------------------------------------------
def _bias(
    q: Tensor, k: Tensor, encoding: Encoding, terms: Sequence[RelativeTerm], scale: float, layer: int
) -> Tensor | None:
    """What is added to the scaled logits (B, H, N, M), if anything: of place alone, and of content and place."""
    for table in (*(encoding.bias or ()), *(term.index for term in terms)):
        _check(table.shape[-2], 0, q.shape[2], "queries")
        _check(table.shape[-1], 0, k.shape[2], "keys")
    bias = bias_at(encoding, layer)
    for term in terms:
        if term.acts_on == "q":
            found = _of_index(q, term) * scale
        elif term.acts_on == "k":
            found = _of_index(k, term._replace(index=term.index.transpose(-2, -1))).transpose(-2, -1) * scale
        else:
            continue
        bias = found if bias is None else bias + found
    return bias


def _of_index(x: Tensor, term: RelativeTerm) -> Tensor:
    """x_i · r_ij (B, H, N, M) of x (B, H, N, D): a product for each row of the table, of which each pair takes one."""
    products = F.pad(x @ term.table.to(x.dtype).transpose(-2, -1), (0, 1))  # (B, H, N, T + 1)
    index = term.index if term.index.ndim == 3 else term.index[None]
    return products.gather(-1, index[:, None].expand(*products.shape[:3], -1))


def _spelled_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    dropout: float,
    scale: float,
    values: Sequence[RelativeTerm],
) -> Tensor:
    """Attention step by step, for exporters and for terms that act on the values, which need the weights."""
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    logits = q * scale @ k.transpose(-2, -1)
    if mask is not None or causal:
        logits = _with_mask(logits, mask, causal)
    weights = F.dropout(logits.softmax(dim=-1), dropout)
    out = weights @ v
    for term in values:
        rows = term.table.shape[-2]
        index = (term.index if term.index.ndim == 3 else term.index[None])[:, None].expand_as(weights)
        gathered = weights.new_zeros(*weights.shape[:3], rows + 1).scatter_add(-1, index, weights)
        out = out + gathered[..., :rows] @ term.table.to(v.dtype)
    return out


def _with_mask(bias: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """A bias (…, N, M) with a mask's places closed, in the bias's dtype."""
    if causal:
        mask = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask.to(bias.dtype)
