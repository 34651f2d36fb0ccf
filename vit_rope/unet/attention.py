"""diffusers' attention with positions, and what carries the grid of a flattened map to it.

A position scheme is a function of coordinates. diffusers runs attention through a processor, which anybody may replace;
here replacing it is an error, for it would drop the positions without a word. A transformer flattens its map before
attention sees it, so it hands the grid on with the tokens.
"""

import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import attend, attend_linear, attend_packed, unread
from ..positions import Encoding, Position
from ..positions.encoding import turns_alike
from .maps import Kind, MapLayout


class PositionProcessor:
    """What diffusers' AttnProcessor2_0 computes, for self-attention with positions; or linear attention instead."""

    def __init__(self, kind: Kind = "softmax") -> None:
        self.kind = kind

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        grid: Sequence[int] | None = None,
    ) -> Tensor:
        """A map (B, C, H, W), or its tokens (B, H·W, C) and `grid` (H, W), to the same shape."""
        if encoder_hidden_states is not None:
            raise ValueError("this attention has positions, and keys from elsewhere (encoder_hidden_states) have none")
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        if x.ndim == 4:
            grid, x = x.shape[-2:], x.flatten(2).transpose(1, 2)
        if grid is None:
            raise ValueError("this attention has positions; give it a map (B, C, H, W), or tokens and grid=(H, W)")
        batch, tokens, _ = x.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        x = x.contiguous()  # once, or each of the three projections would do it for itself
        coords, grid = attn.layout.coords(grid, x.device), list(grid)
        x = attn.position.embed(x, coords, grid)
        x = self.attend(attn, x, attn.position(coords, grid=grid), attention_mask)
        x = attn.to_out[1](attn.to_out[0](x.transpose(1, 2).flatten(2)))
        if hidden_states.ndim == 4:
            x = x.transpose(-1, -2).reshape(hidden_states.shape)
        if attn.residual_connection:
            x = x + hidden_states
        return x / attn.rescale_output_factor

    def attend(self, attn: Any, x: Tensor, encoding: Encoding, mask: Tensor | None) -> Tensor:
        """Attention (B, H, N, D) of tokens (B, N, C); what turns alike is projected and turned at once."""
        projections = (attn.to_q, attn.to_k, attn.to_v)
        if self.kind == "softmax" and turns_alike(encoding) and attn.norm_q is attn.norm_k is None:
            packed = pack(*projections)
            if packed is not None:
                return attend_packed(F.linear(x, *packed), attn.heads, encoding, mask=mask, overwrite=True)
        q, k, v = (to(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for to in projections)
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if self.kind == "linear":
            return attend_linear(q, k, v, encoding, mask=mask)
        return attend(q, k, v, encoding, mask=mask, overwrite=unread(attn.to_q, attn.to_k))


def pack(*projections: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of one projection in place of several, where they are plain ones that nobody watches."""
    linears: Any = projections
    if any(type(part) is not nn.Linear or "forward" in vars(part) for part in projections) or not unread(*projections):
        return None
    watched = any(part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks for part in projections)
    biases = [part.bias for part in linears if part.bias is not None]
    if watched or len({part.out_features for part in linears}) > 1 or len(biases) not in (0, len(linears)):
        return None
    return torch.cat([part.weight for part in linears]), torch.cat(biases) if biases else None


class PlacedAttention(Attention):
    """Self-attention with positions, which no other processor may drop."""

    layout: MapLayout
    position: Position

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self._check(self.processor)
        return super().forward(*args, **kwargs)

    def set_processor(self, processor: Any) -> None:
        self._check(processor)
        super().set_processor(processor)

    def fuse_projections(self, fuse: bool = True) -> None:
        raise ValueError("attention with positions cannot fuse its projections; call remove_positions first")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if prefix and not re.search(r"(down_blocks|mid_block|up_blocks)\.", prefix):  # asked of some part of the U-Net
            warnings.warn(
                "the weights of a part of a U-Net are read without its positions; where another model takes them over, "
                "such as by from_unet or from_unet2d, call add_positions on that one too",
                stacklevel=2,
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _check(self, processor: Any) -> None:
        if type(processor) is not PositionProcessor:
            raise ValueError(
                f"{type(processor).__name__} would drop the positions of this attention: slicing, xformers, adapters "
                f"and other processors do not go with positions; leave them out, or call remove_positions first"
            )


class UnplacedAttention(Attention):
    """Cross-attention, whose keys have no place: it leaves the grid to its neighbour."""

    def forward(self, *args: Any, grid: Sequence[int] | None = None, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)


class GridTransformer2DModel(Transformer2DModel):
    """A transformer that tells its attention what grid the tokens come from.

    As an argument, not an attribute: a block which gradient checkpointing runs again still has its own grid, whatever
    shape of image came in between.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        options = kwargs.get("cross_attention_kwargs") or {}
        kwargs["cross_attention_kwargs"] = options | {"grid": hidden_states.shape[-2:]}
        return super().forward(hidden_states, *args, **kwargs)
