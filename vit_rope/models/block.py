"""timm's attention and transformer block, with a required position encoding.

A position scheme is a function of coordinates. The block passes the encoding of the scheme on to
attention, which applies it.

Shapes   B samples, N tokens, C channels, H heads, D channels of a head
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..attention import attend, attend_linear, attend_qkv
from ..ops.rotate import only_attention_reads
from ..positions import Encoding
from .tracing import is_traced


class RopeAttention(Attention):
    """timm's Attention, with queries and keys transformed by a position encoding.

    `RopeBlock` sets its layer and its kind by `configure`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.layer, self.linear, self.num_kv_heads = 0, False, self.num_heads

    def configure(self, layer: int, linear: bool = False, num_kv_heads: int | None = None) -> None:
        """Set what timm's Block cannot pass to the constructor, before weights are initialized.

        Args:
            layer: index of the layer, which selects from encodings that differ between layers
            linear: linear attention, whose cost grows linearly with the number of tokens
            num_kv_heads: number of heads of keys and values, each shared by a group of query heads
                (arXiv:2305.13245); None for as many as queries

        Raises ValueError where the heads of queries do not divide into groups of equal size.
        """
        self.layer, self.linear = layer, linear
        if num_kv_heads is None or num_kv_heads == self.num_heads:
            return
        if num_kv_heads < 1 or self.num_heads % num_kv_heads:
            raise ValueError(f"{self.num_heads} heads do not divide into {num_kv_heads} groups; change num_kv_heads")
        old, width = self.qkv, (self.num_heads + 2 * num_kv_heads) * self.head_dim
        factory = {"device": old.weight.device, "dtype": old.weight.dtype}
        self.qkv = nn.Linear(old.in_features, width, old.bias is not None, **factory)
        self.num_kv_heads = num_kv_heads

    @property
    def packed(self) -> bool:
        """Whether the projection goes to attention unsplit, which is faster."""
        plain = isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)
        return plain and not self.linear and self.num_kv_heads == self.num_heads

    def forward(  # pyrefly: ignore[bad-override]  an encoding is required on purpose
        self, x: Tensor, encoding: Encoding, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Tokens (B, N, C) to tokens (B, N, C)."""
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        dropout = self.attn_drop.p if self.training else 0.0
        qkv = self.qkv(x)  # (B, N, 3·H·D)
        layer, fused = self.layer, self.fused_attn
        if self.packed:
            overwrite = not is_traced(x) and only_attention_reads(self.qkv)
            x = attend_qkv(qkv, self.num_heads, encoding, layer, attn_mask, is_causal, dropout, fused, overwrite)
        else:
            heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
            q, k, v = qkv.unflatten(-1, (-1, self.head_dim)).transpose(1, 2).split(heads, dim=1)  # (B, H, N, D)
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
    """timm's Block, called with an encoding: it cannot run without positions by mistake.

    `depth` is the index of the layer, as in timm; `linear` and `num_kv_heads` are options of
    `RopeAttention.configure`.
    """

    def __init__(
        self, *args: Any, depth: int = 0, linear: bool = False, num_kv_heads: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, depth=depth, **kwargs | {"attn_layer": RopeAttention})
        cast(RopeAttention, self.attn).configure(depth, linear, num_kv_heads)

    def forward(  # pyrefly: ignore[bad-override]  an encoding is required on purpose
        self, x: Tensor, encoding: Encoding, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Tokens (B, N, C) to tokens (B, N, C)."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), encoding, attn_mask, is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    *args: Any,
    embed: Callable[[Tensor, int], Tensor] | None = None,
    checkpoint: Callable[..., Any] | None = None,
) -> Iterator[Tensor]:
    """Call blocks one after another and yield the tokens (B, N, C) after each of them.

    It is a generator so that no frame keeps the tokens of earlier layers in memory.

    Args:
        blocks: transformer blocks, called as `block(x, *args)`
        x: tokens (B, N, C)
        embed: adds absolute positions again, as `embed(x, layer)` before every layer but the first;
            None for schemes that act once
        checkpoint: activation checkpointing, as `checkpoint(block, x, *args)`; None for none
    """
    for layer, block in enumerate(blocks):
        if layer > 0 and embed is not None:
            x = embed(x, layer)
        x = block(x, *args) if checkpoint is None else checkpoint(block, x, *args)
        yield x


def last(tokens: Iterator[Tensor]) -> Tensor:
    """The last of the tokens that `run_blocks` yields, without keeping the others in memory."""
    x = next(tokens)
    for x in tokens:  # noqa: B007
        pass
    return x


def as_timm(maps: list[Tensor], prefix: list[Tensor] | None, features: Tensor | None, output_dict: bool) -> Any:
    """The results of `forward_intermediates` in timm's forms: a dictionary, a list, or a pair with
    the final tokens.

    `maps` (B, C, *grid) or (B, N, C), `prefix` (B, prefix, C) and `features` (B, prefix + N, C),
    the latter two None where they were not asked for.
    """
    if output_dict:
        entries = {"image_intermediates": maps, "image_intermediates_prefix": prefix, "image_features": features}
        return {name: value for name, value in entries.items() if value is not None}
    results = maps if prefix is None else list(zip(maps, prefix, strict=True))
    return results if features is None else (features, results)
