"""diffusers' attention with positions, and how the grid of a flattened map reaches it.

A position scheme is a function of coordinates. diffusers runs attention through a processor, which
any code may replace; here replacing it is an error, as it would silently drop the positions. A
transformer flattens its map before attention, so it passes the grid along with the tokens.

Shapes   B samples, C channels, N tokens or cells of a map, H heads, D channels of a head
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

from ..attention import attend, attend_linear, attend_qkv
from ..ops.rotate import only_attention_reads
from ..positions import Encoding, Position
from .maps import (
    AttentionKind,
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

SIZE_IS_IN_CONFIG = (  # of two error messages
    "a diffusers U-Net has the size of its training images in its config; "
    "set it there, e.g. by unet.register_to_config(sample_size=(32, 32))"
)


# ---- positions in all attentions of a U-Net, or in none ------------------------------------------
def install(unet: Any, spec: str, unit: str, origin: Origin, attention: AttentionKind) -> None:
    """Give all self-attentions over maps positions, or none, and record it in the config.

    Raises ValueError, and changes nothing, where `vit_rope.unet.add_positions` says so.
    """
    targets = list(map_attentions(unet))
    check_reached(unet, {name for name, _, _ in targets})
    if unet.config.get("sample_size") is None:
        raise ValueError(f"{SIZE_IS_IN_CONFIG}; it is None")
    size, plan, hosts = pixels(unet.config.sample_size), [], set()
    for name, module, host in targets:
        if type(module) is not Attention or type(module.processor) is not AttnProcessor2_0:
            raise ValueError(
                f"{name} computes attention with a {class_name(module.processor)}, which positions would replace; "
                f"give it the default one first, set_processor(AttnProcessor2_0())"
            )
        level, head = level_of(unet, name), module.inner_dim // module.heads
        layout = map_layout(module.query_dim, module.heads, head, level, size, unit, origin)
        plan.append((module, layout, build_at(name, level, spec, layout, _remedy(host), attention)))
        hosts.add(host)
    for module, layout, position in plan:
        module.__class__ = PositionAttention
        module.layout, module.position = layout, position
        module.set_processor(PositionProcessor(attention))
    for host in hosts - {None}:
        host.__class__ = GridTransformer2DModel
        for module in host.modules():
            if type(module) is Attention:
                module.__class__ = GridIgnoringAttention
    unet.register_to_config(position=spec, position_unit=unit, position_origin=origin, attention=attention)


def reinstall(unet: Any, spec: str) -> None:
    """Switch all attentions with positions to another spec, or none, and record it in the config.

    Parameters stay. Raises ValueError, and changes nothing, for a spec that does not fit or has
    other parameters.
    """
    plan = [
        (
            module,
            build_at(
                name, level_of(unet, name), spec, module.layout, _remedy(host), unet.config.attention, module.position
            ),
        )
        for name, module, host in map_attentions(unet)
        if isinstance(module, PositionAttention)
    ]
    for module, position in plan:
        module.position = position
    unet.register_to_config(position=spec)


def uninstall(unet: nn.Module) -> None:
    """Remove positions from all attentions; the config stays."""
    plain: Any = AttnProcessor2_0()
    for module in unet.modules():
        if isinstance(module, PositionAttention):
            del module.position, module.layout
            Attention.set_processor(module, plain)
        module.__class__ = _STOCK.get(type(module), type(module))


def _remedy(host: nn.Module | None) -> str:
    """What to change in the config where the head size of an attention does not fit."""
    what = "channels of a head" if host is None else "number of heads"
    return f"attention_head_dim in the U-Net's config sets the {what} here"


# ---- what attention computes ---------------------------------------------------------------------
class PositionProcessor:
    """diffusers' AttnProcessor2_0 with positions, or linear attention in its place."""

    def __init__(self, attention: AttentionKind = "softmax") -> None:
        self.attention = attention

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        grid: Sequence[int] | None = None,
    ) -> Tensor:
        """A map (B, C, height, width), or tokens (B, N, C) and their `grid`, to the same shape."""
        if encoder_hidden_states is not None:
            raise ValueError(
                "this attention has positions, but keys from elsewhere (encoder_hidden_states) have none; "
                "leave them out"
            )
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
        x = x.contiguous()  # once, instead of in each of the three projections
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
        """Attention (B, H, N, D) of tokens (B, N, C).

        Queries, keys and values come from one product, and are rotated together, where possible.
        """
        projections = (attn.to_q, attn.to_k, attn.to_v)
        if self.attention == "softmax" and encoding.rotates_only() and attn.norm_q is attn.norm_k is None:
            packed = pack_projections(*projections)
            if packed is not None:
                return attend_qkv(F.linear(x, *packed), attn.heads, encoding, mask=mask, overwrite=True)
        overwrite = only_attention_reads(*projections[:2])
        q, k, v = (project(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for project in projections)
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        if self.attention == "linear":
            return attend_linear(q, k, v, encoding, mask=mask)
        return attend(q, k, v, encoding, mask=mask, overwrite=overwrite)


def pack_projections(*projections: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight (3 H D, C) and bias (3 H D,) of one projection in place of several.

    None unless all are plain `nn.Linear` of one size, without hooks and with their own `forward`.
    """
    linears: Any = projections
    if not only_attention_reads(*projections):
        return None
    hooked = any(part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks for part in projections)
    biases = [part.bias for part in linears if part.bias is not None]
    if hooked or len({part.out_features for part in linears}) > 1 or len(biases) not in (0, len(linears)):
        return None
    return torch.cat([part.weight for part in linears]), torch.cat(biases) if biases else None


# ---- the modules that attention and its hosts become ---------------------------------------------
class PositionAttention(Attention):
    """Self-attention with positions, which no other processor may drop."""

    layout: MapLayout
    position: Position

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in diffusers. Raises ValueError if the processor was replaced."""
        self._check(self.processor)
        return super().forward(*args, **kwargs)

    def set_processor(self, processor: Any) -> None:
        """As in diffusers. Raises ValueError for a processor that would drop the positions."""
        self._check(processor)
        super().set_processor(processor)

    def fuse_projections(self, fuse: bool = True) -> None:
        """Raises ValueError: diffusers' fused processor would drop the positions."""
        raise ValueError("attention with positions cannot fuse its projections; call remove_positions first")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # without the name of a block, the prefix is that of a part of the U-Net, not of all of it
        if prefix and not re.search(r"(down_blocks|mid_block|up_blocks)\.", prefix):
            warnings.warn(
                "the weights of a part of a U-Net are read without its positions; if another model takes them over, "
                "as from_unet and from_unet2d do, call add_positions on that model too",
                stacklevel=2,
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _check(self, processor: Any) -> None:
        if type(processor) is not PositionProcessor:
            raise ValueError(
                f"{type(processor).__name__} would drop the positions of this attention: slicing, xformers, adapters "
                f"and other processors cannot be combined with positions; leave them out, or call remove_positions "
                f"first"
            )


class GridIgnoringAttention(Attention):
    """Cross-attention, whose keys have no position: it accepts the grid and does not use it."""

    def forward(self, *args: Any, grid: Sequence[int] | None = None, **kwargs: Any) -> Tensor:
        """As in diffusers, without `grid`."""
        return super().forward(*args, **kwargs)


class GridTransformer2DModel(Transformer2DModel):
    """A transformer that passes its attention the grid of the tokens.

    The grid is an argument, not an attribute: when gradient checkpointing runs a block again, the
    block gets its own grid, even if images of another shape came in between.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, for a map (B, C, height, width)."""
        options = kwargs.get("cross_attention_kwargs") or {}
        kwargs["cross_attention_kwargs"] = options | {"grid": hidden_states.shape[-2:]}
        return super().forward(hidden_states, *args, **kwargs)


_STOCK: dict[type[nn.Module], type[nn.Module]] = {
    PositionAttention: Attention,
    GridIgnoringAttention: Attention,
    GridTransformer2DModel: Transformer2DModel,
}
