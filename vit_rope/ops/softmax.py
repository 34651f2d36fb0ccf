"""Attention weights step by step, where no fused kernel can be used: for exporters, and for terms
that need the weights.

Shapes   B samples, H heads, N queries, M keys, D channels of a head
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float) -> Tensor:
    """Softmax weights (B, H, N, M) of queries (B, H, N, D) over keys (B, H, M, D), with dropout."""
    logits = q * scale @ k.transpose(-2, -1)
    if mask is not None or causal:
        logits = masked(logits, mask, causal)
    return F.dropout(logits.softmax(dim=-1), dropout)


def masked(logits: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Logits or biases (…, N, M) with a mask applied, in their dtype: -inf where a boolean mask is
    False.
    """
    if causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask is None:
        return logits
    return logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.to(logits.dtype)
