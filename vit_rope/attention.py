"""Attention under a position encoding: the one place where queries, keys and values meet positions.

A position scheme is a function of coordinates. Attention asks it what to do and never asks which
scheme it is.

Shapes   B samples, H heads, N queries, M keys, D channels of a head, E channels of a value
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops.rotate import may_overwrite, rotate_groups
from .ops.softmax import attention_weights, masked
from .positions.encoding import Encoding
from .positions.transform import Transform, check_fits, check_tokens


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
    """Softmax attention (B, H, N, D) of queries (B, H, N, D) over keys and values (B, H, M, D) with
    their positions.

    `mask`, broadcastable to (B, H, N, M), is True where a query may attend, or is added to the
    scaled logits; `causal` hides later keys. An encoding without a bias leaves the mask as it is,
    so that flash kernels can be used. `fused=False` computes the softmax explicitly, for exporters.
    `overwrite` allows the rotation to overwrite q and k, unless two of q, k and v share memory.
    Keys and values may have fewer heads, each shared by a group of query heads. Raises ValueError
    where the encoding is for another number of tokens, heads or samples, or where mask and causal
    are both given.
    """
    if causal and mask is not None:
        raise ValueError("attend takes a mask or causal=True, not both; put the causal part into the mask")
    width, scale = v.shape[-1], q.shape[-1] ** -0.5 * encoding.scale
    bias = encoding.added_logits(q, k, layer, scale)
    if bias is not None:
        mask, causal = masked(bias.to(v.dtype), mask, causal), False
    overwrite = overwrite and not encoding.reads_content() and may_overwrite(q, k, v)
    q = encoding.apply("q", q, layer, overwrite)
    k = encoding.apply("k", k, layer, overwrite)
    v = encoding.apply("v", v, layer)
    if k.shape[1] != v.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if encoding.extra("q") is not None:
        q, k = encoding.append("q", q * scale, layer), encoding.append("k", k, layer)
        v, scale = F.pad(v, (0, q.shape[-1] - width)), 1.0  # flash kernels need heads of one width
    q, k = q.to(v.dtype), k.to(v.dtype)
    values = encoding.terms(layer, "v")
    if fused and not values:
        grouped = not torch.jit.is_tracing() and q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped)
    else:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) if t.shape[1] != q.shape[1] else t for t in (k, v))
        weights = attention_weights(q, k, mask, causal, dropout, scale)
        out = sum((term.mixture(weights) for term in values), weights @ v[..., :width])
    return encoding.apply("out", out[..., :width], layer)


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

    Where queries and keys rotate alike, one product rotates both, and their gradients are written
    straight into that of the projection. Raises ValueError where qkv cannot be split into queries,
    keys and values of this many heads.
    """
    if qkv.shape[-1] % (3 * heads):
        raise ValueError(f"{qkv.shape[-1]} channels do not divide into queries, keys and values of {heads} heads")
    groups = qkv.unflatten(-1, (3, heads, -1))
    table = encoding.rotation(layer) if encoding.rotates_only() else None
    if table is None:
        q, k, v = groups.transpose(1, 3).unbind(2)
        # autograd forbids overwriting one of several views of a tensor
        return attend(q, k, v, encoding, layer, mask, causal, dropout, fused, False)
    prefix = encoding.prefix[0]
    check_tokens(prefix + table.shape[1], groups.shape[1], "queries")
    check_fits(table.shape[0], table.shape[2], groups.select(2, 0).transpose(1, 2), "queries")
    q, k, v = rotate_groups(groups, table, 2, encoding.stride, prefix, overwrite)
    return attend(q, k, v, encoding._replace(q=Transform()), layer, mask, causal, dropout, fused, False)


def attend_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    encoding: Encoding,
    layer: int = 0,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Linear attention (B, H, N, E) of queries (B, H, N, D) over keys (B, H, M, D) and values (B,
    H, M, E).

    out_i = sum_j (R_i f(q_i)) · (R_j f(k_j)) v_j / sum_j f(q_i) · f(k_j) with features f = elu + 1
    (arXiv:2006.16236). Positions rotate the numerator only, because the denominator must stay
    positive (RoFormer, arXiv:2104.09864, section 3.3). `mask` (…, 1, M) is True for keys that may
    be seen. Raises ValueError for any other mask, for causal attention, and for an encoding that
    `check_linear` refuses.
    """
    if causal or (mask is not None and (mask.dtype != torch.bool or mask.ndim < 2 or mask.shape[-2] != 1)):
        raise ValueError(
            "linear attention sums the keys once for all queries, so it cannot be causal, "
            "and its mask can only hide keys: True for those to see, of shape (…, 1, keys)"
        )
    precise = torch.float64 if v.dtype == torch.float64 else torch.float32
    q, k = (F.elu(t.to(precise)) + 1 for t in (q, k))
    k = k / k.shape[2]  # a mean, because sums over many keys exceed the range of float16
    if mask is not None:
        k = k * mask.transpose(-2, -1)
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    q = q / (q * k.sum(dim=2, keepdim=True)).sum(dim=-1, keepdim=True)
    return attend_features(q.to(v.dtype), k.to(v.dtype), v, encoding, layer)


def attend_features(q: Tensor, k: Tensor, v: Tensor, encoding: Encoding, layer: int = 0) -> Tensor:
    """The numerator (B, H, N, E) of linear attention, of queries and keys that are normalised
    features already.

    An encoding's temperature does nothing here: it would scale the weights and their sum alike.
    Raises ValueError for an encoding that `check_linear` refuses.
    """
    check_linear(encoding)
    q, k, v = (encoding.apply(side, x, layer) for side, x in (("q", q), ("k", k), ("v", v)))
    return encoding.apply("out", q @ (k.transpose(-2, -1) @ v), layer)


def check_linear(encoding: Encoding) -> None:
    """Raise ValueError for an encoding that linear attention could only apply in part."""
    if encoding.adds_logits():
        raise ValueError("linear attention has no logits, so a scheme that adds a bias to them cannot be used")
    if encoding.polar:
        raise ValueError("linear attention has its own features, so a scheme that makes others cannot be used")
