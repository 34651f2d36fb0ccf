"""Positions in the full and linear attention of denoising-diffusion-pytorch's `Unet`.

A position scheme is a function of coordinates. This U-Net puts learned keys and values ("memory")
before those of the map; they have no position. In linear attention only the numerator is rotated,
as in section 3.3 of RoFormer (arXiv:2104.09864). The denominator stays positive: it is that of the
two softmaxes, which come before the rotation.

Shapes   B samples, C channels, N cells of a map, M memory tokens, H heads, D channels of a head
"""

from collections.abc import Sequence
from typing import Any

import torch
from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Attention, LinearAttention, Unet
from einops import rearrange
from torch import Tensor, nn

from ..attention import attend, attend_features
from ..positions import Encoding, Position
from .maps import AttentionKind, MapLayout, Origin, build_at, map_layout, pixels

HEAD_REMEDY = "attn_dim_head of the Unet sets the channels of a head"


class LucidrainsPositions(nn.Module):
    """What both kinds of attention share: the coordinates of their queries and keys."""

    layout: MapLayout
    position: Position

    def project(self: Any, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor, Encoding]:
        """Project a map x (B, C, height, width).

        Returns queries (B, H, N, D), keys and values (B, H, M + N, D) that begin with `memory`
        (2, H, M, D), and the encoding.
        """
        grid = list(x.shape[-2:])
        coords = self.layout.coords(grid, x.device)
        tokens = self.position.embed(self.norm(x).flatten(2).transpose(1, 2), coords, grid)
        image = rearrange(tokens, "b (y x) c -> b c y x", y=grid[0])
        qkv = self.to_qkv(image)
        q, k, v = rearrange(qkv, "b (three h d) y x -> three b h (y x) d", three=3, h=self.heads)
        k, v = (torch.cat((m.expand(len(x), -1, -1, -1), t), dim=2) for m, t in zip(memory, (k, v), strict=True))
        return q, k, v, self.position(coords, 0, key_prefix=memory.shape[2], grid=grid)

    def output(self: Any, tokens: Tensor, x: Tensor) -> Tensor:
        """Project attention's output (B, H, N, D) to a map of the size of x."""
        return self.to_out(rearrange(tokens, "b h (y x) d -> b (h d) y x", y=x.shape[-2]))


class LucidrainsAttention(LucidrainsPositions, Attention):
    """Full attention with positions."""

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, C, height, width) to a map of the same shape."""
        return self.output(attend(*self.project(x, self.mem_kv), fused=self.attend.flash), x)


class LucidrainsLinearAttention(LucidrainsPositions, LinearAttention):
    """Linear attention with positions."""

    def forward(self, x: Tensor) -> Tensor:
        """A map (B, C, height, width) to a map of the same shape."""
        q, k, v, encoding = self.project(x, self.mem_kv.transpose(-2, -1))
        tokens = attend_features(q.softmax(dim=-1) * self.scale, k.softmax(dim=-2), v, encoding)
        return self.output(tokens, x)


_WITH_POSITIONS: dict[type, type] = {Attention: LucidrainsAttention, LinearAttention: LucidrainsLinearAttention}


def add_to_lucidrains(
    unet: nn.Module, spec: str, sample_size: int | Sequence[int] | None, unit: str = "index", origin: Origin = 0.0
) -> nn.Module:
    """Give every attention the positions named by `spec`; see `vit_rope.unet.add_positions`."""
    _check_lucidrains(unet)
    if _attentions_with_positions(unet):
        raise ValueError(
            "the U-Net has positions already; call set_positions for another spec, or remove_positions first"
        )
    if sample_size is None:
        raise ValueError("this Unet does not know the size of its training images; give sample_size, as in image_size")
    size, plan = pixels(sample_size), []
    for name, attention, level in lucidrains_attentions(unet):
        head = attention.to_qkv.out_channels // (3 * attention.heads)
        layout = map_layout(attention.to_qkv.in_channels, attention.heads, head, level, size, unit, origin)
        plan.append((attention, layout, build_at(name, level, spec, layout, HEAD_REMEDY, _kind(attention))))
    for attention, layout, position in plan:
        attention.__class__ = _WITH_POSITIONS[type(attention)]
        attention.layout, attention.position = layout, position
    return unet


def set_in_lucidrains(unet: nn.Module, spec: str) -> nn.Module:
    """Switch to another spec, in place; see `vit_rope.unet.set_positions`."""
    _check_lucidrains(unet)
    if not _attentions_with_positions(unet):
        raise ValueError(f"this {type(unet).__name__} has no positions to change; call add_positions")
    plan = [
        (attention, build_at(name, level, spec, attention.layout, HEAD_REMEDY, _kind(attention), attention.position))
        for name, attention, level in lucidrains_attentions(unet)
    ]
    for attention, position in plan:
        attention.position = position
    return unet


def remove_from_lucidrains(unet: nn.Module) -> nn.Module:
    """Undo `add_to_lucidrains`, in place. Raises ValueError if there are no positions."""
    attentions = _attentions_with_positions(unet)
    if not attentions:
        raise ValueError(f"this {type(unet).__name__} has no positions to remove")
    for attention in attentions:
        del attention.position, attention.layout
        attention.__class__ = next(stock for stock, cls in _WITH_POSITIONS.items() if cls is type(attention))
    return unet


def lucidrains_attentions(unet: Any) -> list[tuple[str, Any, int]]:
    """Name, module and level (number of halvings of its map) of every attention."""
    last = len(unet.downs) - 1
    downs = [(f"downs.{i}.2", level[2], i) for i, level in enumerate(unet.downs)]
    ups = [(f"ups.{i}.2", level[2], last - i) for i, level in enumerate(unet.ups)]
    return [*downs, ("mid_attn", unet.mid_attn, last), *ups]


def _check_lucidrains(unet: nn.Module) -> None:
    if not isinstance(unet, Unet):
        raise TypeError(f"of denoising-diffusion-pytorch, only Unet can have positions, not {type(unet).__name__}")


def _attentions_with_positions(unet: nn.Module) -> list[LucidrainsPositions]:
    return [module for module in unet.modules() if isinstance(module, LucidrainsPositions)]


def _kind(attention: nn.Module) -> AttentionKind:
    return "linear" if isinstance(attention, LinearAttention) else "softmax"
