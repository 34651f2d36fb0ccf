"""A transformer that denoises images, made of the ViT's own blocks: a DiT (arXiv:2212.09748) with any position scheme.

A position scheme is a function of coordinates. Here, unlike in a convolutional U-Net, nothing else tells the model
where its patches are. Time and label steer every block by scaling, shifting and gating (adaLN-zero), so that the model
begins as one that predicts zeros. It is called, saved and loaded as diffusers' models are, and takes every size of
images that divides into patches.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils import is_accelerate_available
from torch import Tensor, nn

from ..positions import Encoding, Layout, build
from ..unet.classes import reset_missing_parameters
from ..unet.maps import AttentionKind, check_attention
from .block import RopeBlock


class SteeredBlock(RopeBlock):
    """The ViT's block, its norms scaled and shifted, its branches gated by a condition; it begins as identity."""

    def __init__(self, dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(dim, *args, norm_layer=partial(nn.LayerNorm, elementwise_affine=False, eps=1e-6), **kwargs)
        self.steer = _zero(nn.Linear(dim, 6 * dim))

    def forward(  # pyrefly: ignore[bad-override]  a condition is required on purpose
        self, x: Tensor, encoding: Encoding, condition: Tensor
    ) -> Tensor:
        """Tokens (B, N, C) under a condition (B, C) to tokens (B, N, C)."""
        scale1, shift1, gate1, scale2, shift2, gate2 = self.steer(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, encoding)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class RopeDiT(ModelMixin, ConfigMixin):
    """A diffusion transformer with positions, in place of diffusers' UNet2DModel.

    Args:
        sample_size: pixels along a side of the images in training, or (height, width)
        in_channels, out_channels: of an image, and of what is predicted (as many unless given)
        patch_size: pixels along a side of a patch
        embed_dim, depth, num_heads, mlp_ratio: of the blocks, as in timm's ViT
        position: a spec of any registered scheme, such as "sincos + axial(base=100)"
        position_unit, position_origin: how patches get coordinates, as in `positions.coords.grid`
        attention: "softmax" or "linear" (`attention.attend_linear`)
        num_class_embeds: how many labels there are; None for a model without labels

    Raises ValueError, before any weight is made, where a spec, a size or a head dimension does not fit.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("SteeredBlock",)

    @register_to_config
    def __init__(
        self,
        sample_size: int | Sequence[int] = 32,
        in_channels: int = 3,
        out_channels: int | None = None,
        patch_size: int = 2,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        position: str = "axial(base=100)",
        position_unit: str = "index",
        position_origin: float | str | Sequence[float] = 0.0,
        attention: AttentionKind = "softmax",
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        size = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
        self.patch_size, self.gradient_checkpointing = patch_size, False
        grid = self._grid(size)
        origin = position_origin if isinstance(position_origin, (int, float, str)) else tuple(position_origin)
        self.layout = Layout(embed_dim, num_heads, tuple(grid), depth, position_unit, origin)
        self.layout.coords()  # an origin that does not fit is found here
        self.position = build(position, self.layout)
        check_attention(attention, self.position, self.layout)
        self.embed = nn.Linear(in_channels * patch_size**2, embed_dim)
        self.time = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, embed_dim)
        self.label_embed = None
        if num_class_embeds is not None:
            self.label_embed = nn.Embedding(num_class_embeds, embed_dim)
            nn.init.normal_(self.label_embed.weight, std=0.02)
        self.blocks = nn.ModuleList(
            SteeredBlock(embed_dim, num_heads, mlp_ratio, qkv_bias=True, depth=i) for i in range(depth)
        )
        for block in self.blocks if attention == "linear" else ():
            cast(Any, block).attn.linearise()
        self.norm = nn.LayerNorm(embed_dim, elementwise_affine=False, eps=1e-6)
        self.steer = _zero(nn.Linear(embed_dim, 2 * embed_dim))
        self.head = _zero(nn.Linear(embed_dim, (out_channels or in_channels) * patch_size**2))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Noisy images (B, C, H, W) at `timestep`, one or (B,), to a prediction of the same size.

        Raises ValueError for a size that does not divide into patches, and where labels (B,) are missing or not known.
        """
        grid, patch = self._grid(sample.shape[2:]), self.patch_size
        if (class_labels is None) != (self.label_embed is None):
            raise ValueError(f"class_labels must {'not ' if self.label_embed is None else ''}be given to this model")
        condition = self.time_embed(self._time(sample, timestep))
        if self.label_embed is not None:
            condition = condition + self.label_embed(class_labels)
        condition = nn.functional.silu(condition)
        x = sample.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 1, 3, 5)
        where = self.layout.coords(grid, sample.device)
        x = self.position.embed(self.embed(x.flatten(3).flatten(1, 2)), where, grid)
        encoding = self.position(where, 0, None, None, grid)
        for i, block in enumerate(self.blocks):
            if i > 0 and self.position.each_layer:
                x = self.position.embed(x, where, grid, i)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = cast(Any, self)._gradient_checkpointing_func(block, x, encoding, condition)
            else:
                x = block(x, encoding, condition)
        scale, shift = self.steer(condition)[:, None].chunk(2, dim=-1)
        x = self.head(self.norm(x) * (1 + scale) + shift)
        x = x.unflatten(1, grid).unflatten(3, (-1, patch, patch)).permute(0, 3, 1, 4, 2, 5)
        x = x.flatten(4).flatten(2, 3)
        return UNet2DOutput(sample=x) if return_dict else (x,)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As diffusers has it; what positions learn and the folder has not, for it was another's, begins anew."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        reset_missing_parameters(loaded[0], loaded[1].get("missing_keys", []))
        return loaded if output_loading_info else loaded[0]

    def __getattr__(self, name: str) -> Any:  # diffusers would answer with the config's spec of this name
        return nn.Module.__getattr__(self, name) if name == "position" else super().__getattr__(name)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone: all that positions learn, and the labels'."""
        return {f"position.{name}" for name, _ in self.position.named_parameters()} | {"label_embed.weight"}

    def _time(self, sample: Tensor, timestep: Tensor | float | int) -> Tensor:
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor(timestep, device=sample.device)
        timestep = timestep.to(sample.device).expand(len(sample))
        return self.time(timestep).to(self.time_embed.linear_1.weight.dtype)

    def _grid(self, size: Sequence[int]) -> list[int]:
        if any(n % self.patch_size for n in size):
            raise ValueError(
                f"images of {' x '.join(map(str, size))} do not divide into patches of {self.patch_size}; "
                f"pad, crop or resize them to multiples of {self.patch_size}"
            )
        return [n // self.patch_size for n in size]


if is_accelerate_available():  # learned frequencies keep their precision in from_pretrained(torch_dtype=…)
    RopeDiT._keep_in_fp32_modules = ["position"]


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
