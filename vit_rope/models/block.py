"""timm's attention and block under an encoding, which no call can leave out.

A position scheme is a function of coordinates. The block hands on what it said, and attention does that and no more.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.fx
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..attention import attend, attend_linear, attend_qkv, has_no_hooks
from ..positions import Encoding


class RopeAttention(Attention):
    """timm's Attention, its queries and keys placed by an encoding."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layer = 0  # the block says which
        self.num_kv_heads = self.num_heads
        self.packed = isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)
        self.linear = False

    def linearise(self) -> None:
        """Become linear attention, whose cost grows with the tokens and not with their square."""
        self.linear, self.packed = True, False

    def group(self, num_kv_heads: int) -> None:
        """Let groups of queries share keys and values of fewer heads (arXiv:2305.13245), before weights are drawn."""
        if num_kv_heads < 1 or self.num_heads % num_kv_heads:
            raise ValueError(f"{self.num_heads} heads do not divide into {num_kv_heads} groups; change num_kv_heads")
        if num_kv_heads < self.num_heads:
            old, width = self.qkv, (self.num_heads + 2 * num_kv_heads) * self.head_dim
            place = {"device": old.weight.device, "dtype": old.weight.dtype}
            self.qkv = nn.Linear(old.in_features, width, old.bias is not None, **place)
            self.num_kv_heads, self.packed = num_kv_heads, False

    def forward(  # pyrefly: ignore[bad-override]  an encoding is required on purpose
        self, x: Tensor, encoding: Encoding, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Tokens (B, N, C) to tokens (B, N, C)."""
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        dropout = self.attn_drop.p if self.training else 0.0
        qkv = self.qkv(x)
        overwrite = not isinstance(x, torch.fx.Proxy) and has_no_hooks(self.qkv)
        layer, fused = self.layer, self.fused_attn
        if self.packed:
            x = attend_qkv(qkv, self.num_heads, encoding, layer, attn_mask, is_causal, dropout, fused, overwrite)
        else:
            heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
            q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2).split(heads, dim=1)
            q, k = self.q_norm(q), self.k_norm(k)
            if self.linear:
                x = attend_linear(q, k, v, encoding, layer, attn_mask, is_causal)
            else:
                x = attend(q, k, v, encoding, layer, attn_mask, is_causal, dropout, fused, False)
        x = self.norm(x.transpose(1, 2).flatten(2))
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))


class RopeBlock(Block):
    """timm's Block, which cannot be called without an encoding: no block ever runs without positions unnoticed."""

    def __init__(self, *args: Any, depth: int = 0, num_kv_heads: Sequence[int] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, depth=depth, **kwargs | {"attn_layer": RopeAttention})
        attention = cast(RopeAttention, self.attn)
        attention.layer = depth
        if num_kv_heads is not None:
            attention.group(num_kv_heads[depth])

    def forward(  # pyrefly: ignore[bad-override]  an encoding is required on purpose
        self, x: Tensor, encoding: Encoding, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Tokens (B, N, C) to tokens (B, N, C)."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), encoding, attn_mask, is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
