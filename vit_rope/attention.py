"""Attention under a position encoding: the one place where queries, keys and values meet positions.

A position scheme is a function of coordinates. Attention asks it what to do and never asks which scheme it is.
"""

import torch
import torch.fx
from torch import Tensor
from torch.nn import functional as F

from .positions import Encoding
from .positions.rotary import rotate


@torch.fx.wrap
@torch.jit.ignore
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
) -> Tensor:
    """Softmax attention (B, H, N, D) of queries (B, H, N, D) over keys and values (B, H, M, D) with their positions.

    `mask`, broadcastable to (B, H, N, M), is True where a query may look or is added to the scaled logits; `causal`
    hides later keys. An encoding without a bias leaves the mask as it is, so that flash kernels stay. `fused=False`
    spells the softmax out, for exporters. Raises ValueError where the encoding is of another number of tokens, or mask
    and causal are both given.
    """
    if causal and mask is not None:
        raise ValueError("attend takes a mask or causal=True, not both; put the causal part into the mask")
    if encoding.turn_q is not None:
        turn_k = encoding.turn_q if encoding.turn_k is None else encoding.turn_k
        q = rotate(q, _of_layer(encoding.turn_q, layer, 2, q.shape[2], "queries"), encoding.half)
        k = rotate(k, _of_layer(turn_k, layer, 2, k.shape[2], "keys"), encoding.half)
    q, k = q.to(v.dtype), k.to(v.dtype)
    if encoding.bias is not None:
        bias = _of_layer(encoding.bias, layer, 3, q.shape[2], "queries").to(v.dtype)
        mask, causal = _with_mask(bias, mask, causal), False
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout)
    logits = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    if mask is not None or causal:
        logits = _with_mask(logits, mask, causal)
    return F.dropout(logits.softmax(dim=-1), dropout) @ v


@torch.fx.wrap
@torch.jit.ignore
def attend_packed(
    qkv: Tensor,
    heads: int,
    encoding: Encoding,
    layer: int = 0,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    fused: bool = True,
) -> Tensor:
    """The attention (B, H, N, D) of `attend`, straight from a projection qkv (B, N, 3·H·D).

    Raises ValueError where qkv does not divide into queries, keys and values of this many heads.
    """
    if qkv.shape[-1] % (3 * heads):
        raise ValueError(f"{qkv.shape[-1]} channels do not divide into queries, keys and values of {heads} heads")
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return attend(q, k, v, encoding, layer, mask, causal, dropout, fused)


def _of_layer(table: Tensor, layer: int, dim: int, tokens: int, what: str) -> Tensor:
    """The part of a table (L, …) for one layer, checked to speak of all tokens."""
    if table.shape[dim] != tokens:
        raise ValueError(
            f"the encoding places {table.shape[dim]} tokens, but there are {tokens} {what}; "
            f"give position(coords, prefix=…) the number of tokens that have no place"
        )
    return table[layer % table.shape[0]]


def _with_mask(bias: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """A bias (…, N, M) with a mask's places closed, in the bias's dtype."""
    if causal:
        mask = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    return bias.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else bias + mask.to(bias.dtype)
