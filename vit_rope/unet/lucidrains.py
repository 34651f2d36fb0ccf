"""Positions in the attention of denoising-diffusion-pytorch's `Unet`, both its full and its linear attention.

A position scheme is a function of coordinates. The learned keys and values that this U-Net puts before those of the map
have no place. Linear attention turns the numerator alone, as in section 3.3 of RoFormer (arXiv:2104.09864): the weights
that it is divided by stay positive, being here the two softmaxes, which come before the turn.
"""

from collections.abc import Sequence
from typing import Any

import torch
from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Attention, LinearAttention, Unet
from torch import Tensor, nn

from ..attention import attend, attend_features
from ..positions import Encoding, Position
from .maps import MapLayout, Origin, build_at, map_layout, pixels


class Placed(nn.Module):
    """What the two kinds of attention have in common: where their queries and keys are."""

    layout: MapLayout
    position: Position

    def project(self: Any, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor, Encoding]:
        """Queries (B, H, N, D), and keys and values (B, H, M + N, D) after `memory` (2, H, M, D), of a map x."""
        grid = list(x.shape[-2:])
        coords = self.layout.coords(grid, x.device)
        tokens = self.position.embed(self.norm(x).flatten(2).transpose(1, 2), coords, grid)
        qkv = self.to_qkv(tokens.transpose(1, 2).unflatten(2, grid)).unflatten(1, (3, self.heads, -1))
        q, k, v = qkv.flatten(4).transpose(3, 4).unbind(1)
        k, v = (torch.cat((m.expand(len(x), -1, -1, -1), t), dim=2) for m, t in zip(memory, (k, v), strict=True))
        return q, k, v, self.position(coords, 0, key_prefix=memory.shape[2], grid=grid)


class PlacedAttention(Placed, Attention):
    """Full attention with positions."""

    def forward(self, x: Tensor) -> Tensor:
        out = attend(*self.project(x, self.mem_kv), fused=self.attend.flash)
        return self.to_out(out.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[-2:]))


class PlacedLinearAttention(Placed, LinearAttention):
    """Linear attention with positions."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, encoding = self.project(x, self.mem_kv.transpose(-2, -1))
        out = attend_features(q.softmax(dim=-1) * self.scale, k.softmax(dim=-2), v, encoding)
        return self.to_out(out.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[-2:]))


_PLACED: dict[type, type] = {Attention: PlacedAttention, LinearAttention: PlacedLinearAttention}


def add_positions(
    unet: nn.Module, spec: str, sample_size: int | Sequence[int] | None, unit: str = "index", origin: Origin = 0.0
) -> nn.Module:
    """Give every attention the positions that `spec` names, in place: `vit_rope.unet.add_positions` has the details."""
    if not isinstance(unet, Unet):
        raise TypeError(f"of denoising-diffusion-pytorch, positions go into Unet alone, not {type(unet).__name__}")
    if any(isinstance(module, Placed) for module in unet.modules()):
        raise ValueError("the U-Net has positions already; call remove_positions first")
    if sample_size is None:
        raise ValueError("this Unet does not know the size that it is trained at; give sample_size, as in image_size")
    size, plan = pixels(sample_size), []
    for name, attention, level in map_attentions(unet):
        head = attention.to_qkv.out_channels // (3 * attention.heads)
        layout = map_layout(attention.to_qkv.in_channels, attention.heads, head, level, size, unit, origin)
        remedy = "attn_dim_head of the Unet sets the channels of a head"
        plan.append((attention, layout, build_at(name, level, spec, layout, remedy)))
    for attention, layout, position in plan:
        attention.__class__ = _PLACED[type(attention)]
        attention.layout, attention.position = layout, position
    return unet


def remove_positions(unet: nn.Module) -> nn.Module:
    """Undo `add_positions`, in place. Raises ValueError where there are no positions."""
    placed = [module for module in unet.modules() if isinstance(module, Placed)]
    if not placed:
        raise ValueError(f"this {type(unet).__name__} has no positions to remove")
    for module in placed:
        del module.position, module.layout
        module.__class__ = next(stock for stock, cls in _PLACED.items() if cls is type(module))
    return unet


def map_attentions(unet: Any) -> list[tuple[str, Any, int]]:
    """Name, module and level of every attention: the map that it sees has been halved so often."""
    last = len(unet.downs) - 1
    downs = [(f"downs.{i}.2", level[2], i) for i, level in enumerate(unet.downs)]
    ups = [(f"ups.{i}.2", level[2], last - i) for i, level in enumerate(unet.ups)]
    return [*downs, ("mid_attn", unet.mid_attn, last), *ups]
