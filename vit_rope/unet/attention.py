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
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention import attend, attend_linear, attend_qkv, has_no_hooks
from ..positions import Encoding, Position
from .maps import (
    Kind,
    MapLayout,
    Origin,
    build_at,
    check_reached,
    class_name,
    level_of,
    map_attentions,
    map_layout,
    pixels,
)

# ---- where attention is ---------------------------------------------------------------------------------------------
SAMPLE_SIZE = (
    "a diffusers U-Net has the size that it is trained at in its config; "
    "set it there, e.g. by unet.register_to_config(sample_size=(32, 32))"
)


def install(unet: Any, spec: str, unit: str, origin: Origin, kind: Kind) -> None:
    """Place every self-attention, all or none, and write so into the config."""
    found = list(map_attentions(unet))
    check_reached(unet, {name for name, _, _ in found})
    if unet.config.get("sample_size") is None:
        raise ValueError(f"{SAMPLE_SIZE}; it is None")
    size, plan, hosts = pixels(unet.config.sample_size), [], set()
    for name, attention, host in found:
        if type(attention) is not Attention or type(attention.processor) is not AttnProcessor2_0:
            raise ValueError(
                f"{name} computes attention its own way, by {class_name(attention.processor)}, which positions would "
                f"replace; give it a plain one first, set_processor(AttnProcessor2_0())"
            )
        level, head = level_of(unet, name), attention.inner_dim // attention.heads
        layout = map_layout(attention.query_dim, attention.heads, head, level, size, unit, origin)
        what = "channels of a head" if host is None else "number of heads"
        remedy = f"attention_head_dim in the U-Net's config sets the {what} here"
        plan.append((attention, layout, build_at(name, level, spec, layout, remedy, kind)))
        hosts.add(host)
    for attention, layout, position in plan:
        attention.__class__ = PlacedAttention
        attention.layout, attention.position = layout, position
        attention.set_processor(PositionProcessor(kind))
    for host in hosts - {None}:
        host.__class__ = GridTransformer2DModel
        for module in host.modules():
            if type(module) is Attention:
                module.__class__ = UnplacedAttention
    unet.register_to_config(position=spec, position_unit=unit, position_origin=origin, attention=kind)


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
        if self.kind == "softmax" and encoding.rotates_only() and attn.norm_q is attn.norm_k is None:
            packed = pack(*projections)
            if packed is not None:
                return attend_qkv(F.linear(x, *packed), attn.heads, encoding, mask=mask, overwrite=True)
        q, k, v = (to(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for to in projections)
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if self.kind == "linear":
            return attend_linear(q, k, v, encoding, mask=mask)
        return attend(q, k, v, encoding, mask=mask, overwrite=has_no_hooks(attn.to_q, attn.to_k))


def pack(*projections: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of one projection in place of several, where they are plain ones that nobody watches."""
    linears: Any = projections
    if any(type(part) is not nn.Linear or "forward" in vars(part) for part in projections) or not has_no_hooks(
        *projections
    ):
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
