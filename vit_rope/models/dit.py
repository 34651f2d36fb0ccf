"""A diffusion transformer (DiT, arXiv:2212.09748) with any position scheme, made of the ViT's
blocks.

A position scheme is a function of coordinates. Unlike in a convolutional U-Net, it is the only
source of the location of patches. Time and label condition every block by adaLN-Zero, so an
untrained model predicts zeros. The model is called, saved and loaded as diffusers' models are, and
takes every image size that is divisible by the patch size.

Shapes   B samples, C channels, N tokens, D channels of a token
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.utils import is_accelerate_available
from einops import rearrange
from torch import Tensor, nn

from ..positions import Encoding, build
from ..positions.specs import rebuild
from ..unet.classes import reset_missing_parameters
from ..unet.maps import AttentionKind, check_attention
from .block import RopeBlock, last, run_blocks
from .options import patch_layout
from .patches import format_size


class AdaLNBlock(RopeBlock):
    """DiT's adaLN-Zero block: a condition scales and shifts the norms and gates both branches. An
    untrained block is the identity."""

    def __init__(self, dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(dim, *args, norm_layer=partial(nn.LayerNorm, elementwise_affine=False, eps=1e-6), **kwargs)
        self.modulation = _zero(nn.Linear(dim, 6 * dim))

    def forward(  # pyrefly: ignore[bad-override]  a condition is required on purpose
        self, x: Tensor, encoding: Encoding, condition: Tensor
    ) -> Tensor:
        """Tokens (B, N, D) and a condition (B, D) to tokens (B, N, D)."""
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, encoding)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class RopeDiT(ModelMixin, ConfigMixin):
    """A diffusion transformer with positions, in place of diffusers' UNet2DModel.

    Args:
        sample_size: pixels along a side of the training images, or (height, width)
        in_channels, out_channels: of the image and of the prediction, equal by default
        patch_size: pixels along a side of a patch
        embed_dim, depth, num_heads, mlp_ratio: of the blocks, as in timm's ViT
        position: a spec of any registered scheme, such as "sincos + axial(base=100)"
        position_unit, position_origin: how patches get coordinates, as in `positions.coords.grid`
        attention: "softmax" or "linear" (`attention.attend_linear`)
        num_class_embeds: number of labels; None for a model without labels

    Raises ValueError for a spec, a size or a head dimension that does not fit, before any weight is
    created.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("AdaLNBlock",)

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
        self.layout = patch_layout(embed_dim, num_heads, self._grid(size), depth, position_unit, position_origin)
        self.position = build(position, self.layout)
        check_attention(attention, self.position, self.layout)
        self.embed = nn.Linear(in_channels * patch_size**2, embed_dim)
        self.time = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = TimestepEmbedding(256, embed_dim)
        self.label_embed = None
        if num_class_embeds is not None:
            self.label_embed = nn.Embedding(num_class_embeds, embed_dim)
            nn.init.normal_(self.label_embed.weight, std=0.02)
        linear = attention == "linear"
        self.blocks = nn.ModuleList(
            AdaLNBlock(embed_dim, num_heads, mlp_ratio, qkv_bias=True, depth=i, linear=linear) for i in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, elementwise_affine=False, eps=1e-6)
        self.modulation = _zero(nn.Linear(embed_dim, 2 * embed_dim))
        self.head = _zero(nn.Linear(embed_dim, (out_channels or in_channels) * patch_size**2))

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict noise, image or velocity, of the shape of the noisy images.

        Args:
            sample: noisy images (B, C, H, W)
            timestep: one for all images, or (B,)
            class_labels: (B,), for a model with labels
            return_dict: return diffusers' output class instead of a tuple

        Raises ValueError for a size that is not divisible by the patch size, for missing labels,
        and for labels given to a model without them.
        """
        grid, patch = self._grid(sample.shape[2:]), self.patch_size
        condition = self._condition(sample, timestep, class_labels)
        coords = self.layout.coords(grid, sample.device)
        tokens = rearrange(sample, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)
        tokens = self.position.embed(self.embed(tokens), coords, grid)
        again = partial(self._embed_again, coords=coords, grid=grid) if self.position.each_layer else None
        checkpointing: Any = self.gradient_checkpointing and torch.is_grad_enabled()
        checkpoint = self._gradient_checkpointing_func if checkpointing else None  # pyrefly: ignore[missing-attribute]
        encoding = self.position(coords, grid=grid)
        tokens = run_blocks(self.blocks, tokens, encoding, condition, embed=again, checkpoint=checkpoint)
        scale, shift = self.modulation(condition)[:, None].chunk(2, dim=-1)
        x = self.head(self.norm(last(tokens)) * (1 + scale) + shift)
        x = rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=patch, q=patch)
        return UNet2DOutput(sample=x) if return_dict else (x,)

    def set_position(self, position: str) -> None:
        """Change the spec and keep the learned parameters of the positions: "ntk(mixed, factor=2)"
        for a model trained with "mixed". Saved models store the new spec.

        Raises ValueError, and changes nothing, for a spec that does not fit the model or has
        parameters of other names or shapes.
        """
        scheme = rebuild(self.position, position)
        check_attention(self.config["attention"], scheme, self.layout)
        self.position = scheme
        self.register_to_config(position=position)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a saved model, as in diffusers. Position parameters that the folder does not have,
        since it was saved with another scheme, are initialized."""
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        reset_missing_parameters(loaded[0], loaded[1].get("missing_keys", []))
        return loaded if output_loading_info else loaded[0]

    def __getattr__(self, name: str) -> Any:  # diffusers would return the config entry of this name
        return nn.Module.__getattr__(self, name) if name == "position" else super().__getattr__(name)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: all of the scheme, and the label embeddings."""
        return {f"position.{name}" for name, _ in self.position.named_parameters()} | {"label_embed.weight"}

    def _embed_again(self, x: Tensor, layer: int, coords: Tensor, grid: list[int]) -> Tensor:
        return self.position.embed(x, coords, grid, layer)

    def _condition(self, sample: Tensor, timestep: Tensor | float | int, labels: Tensor | None) -> Tensor:
        """The embedding (B, D) of time and label."""
        if (labels is None) != (self.label_embed is None):
            raise ValueError(f"class_labels must {'not ' if self.label_embed is None else ''}be given to this model")
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor(timestep, device=sample.device)
        time = self.time(timestep.to(sample.device).expand(len(sample)))
        condition = self.time_embed(time.to(self.time_embed.linear_1.weight.dtype))
        if self.label_embed is not None:
            condition = condition + self.label_embed(labels)
        return nn.functional.silu(condition)

    def _grid(self, size: Sequence[int]) -> list[int]:
        if any(n % self.patch_size for n in size):
            raise ValueError(
                f"images of {format_size(size)} do not divide into patches of {self.patch_size}; "
                f"pad, crop or resize them to multiples of {self.patch_size}"
            )
        return [n // self.patch_size for n in size]


if is_accelerate_available():  # learned frequencies keep their precision in from_pretrained(torch_dtype=…)
    RopeDiT._keep_in_fp32_modules = ["position"]


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
