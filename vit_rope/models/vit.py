"""A timm VisionTransformer whose positions are given by a spec string.

A position scheme is a function of coordinates. The model makes coordinates for its patches, or
takes those of the caller, asks the scheme once per forward pass for an encoding, and passes that to
every block. Images have two axes; `patch_size=(2, 16, 16)` makes a model of video (B, C, T, H, W),
`patch_size=(16,)` a model of signals (B, C, T). `registry.py` has the names for
`timm.create_model`.

Shapes   B samples, N patch tokens, C channels, A axes; a sequence has prefix + N tokens
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from timm.layers import PatchDropoutWithIndices
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..attention import check_linear
from ..positions import Encoding, Layout, build
from ..positions.coords import take_coords
from ..positions.specs import rebuild
from .block import RopeBlock, as_timm, last, run_blocks
from .memory import insert_memory
from .options import check_names, check_options, patch_layout, sizes_per_axis
from .patches import PatchCoordinates, PatchEmbed2d, PatchEmbedNd
from .state_dicts import checkpoint_filter_fn as checkpoint_filter_fn  # where timm and fine-tuning look for it
from .tracing import embed_positions


class RopeViT(VisionTransformer):
    """timm's VisionTransformer with the positions that a spec names, in place of a learned table.

    It takes every argument of timm's class except `attn_layer` and `embed_layer`, and also:

    Args:
        img_size, patch_size: one number, or one for each axis; one or three axes make a model of
            signals or of video
        position: spec of any registered scheme, such as "axial(base=100)"
        position_unit, position_origin: how patches get coordinates, see `positions.coords.grid`
        position_shift, position_jitter, position_rescale: how training varies the coordinates, see
            `positions.coords.augment_coords`
        attention: "softmax" or "linear" (`attention.attend_linear`)
        memory_tokens: number of memory tokens, which follow the other registers (`memory.Reader`)
        pos_embed: "learn" adds timm's own table, which also has rows for class and register tokens
        block_fn: makes a `RopeBlock` from its arguments

    Class and register tokens have no position. Raises ValueError for a spec, a size or a head
    dimension that does not fit, before any weight is created.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_chans: int = 3,
        *,
        position: str = "axial",
        position_unit: str = "index",
        position_origin: float | str | Sequence[float] = 0.0,
        position_shift: float = 0.0,
        position_jitter: float = 1.0,
        position_rescale: float = 1.0,
        attention: Literal["softmax", "linear"] = "softmax",
        memory_tokens: int = 0,
        reg_tokens: int = 0,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        pos_embed: str = "none",
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        block_fn: Any = RopeBlock,
        **kwargs: Any,
    ) -> None:
        check_names(type(self), kwargs)
        image, patch = sizes_per_axis(img_size, patch_size, dynamic_img_pad)
        grid = tuple(-(-n // p) for n, p in zip(image, patch, strict=True))
        layout = patch_layout(embed_dim, num_heads, grid, depth, position_unit, position_origin)
        augment = (position_shift, position_jitter, position_rescale)
        fixed_size = None if dynamic_img_size else image
        patch_coords = PatchCoordinates(layout, in_chans, fixed_size, patch, dynamic_img_pad, augment)
        scheme = build(position, layout)
        check_options(memory_tokens, attention, scheme, layout, kwargs)
        super().__init__(
            cast(Any, image),
            cast(Any, patch),
            in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            reg_tokens=reg_tokens + memory_tokens,
            pos_embed=pos_embed,
            dynamic_img_size=dynamic_img_size,
            dynamic_img_pad=dynamic_img_pad,
            embed_layer=partial(PatchEmbed2d if len(patch) == 2 else PatchEmbedNd, output_fmt="NHWC"),
            block_fn=cast(Any, partial(block_fn, linear=attention == "linear")),
            **kwargs,
        )
        self.memory_tokens = memory_tokens
        if memory_tokens > 0:  # the scale of the normalized memory that later segments start with
            nn.init.normal_(cast(Tensor, self.reg_token)[:, reg_tokens:].detach())
        self.patch_coords = patch_coords
        device = kwargs.get("device")
        self.position = scheme if device is None else scheme.to(device)
        # not a Sequential, which could be called without an encoding
        self.blocks = nn.ModuleList(self.blocks)  # pyrefly: ignore[bad-assignment]
        rate = kwargs.get("patch_drop_rate", 0.0)
        drop = PatchDropoutWithIndices(rate, self.num_prefix_tokens) if rate > 0 else None
        self.patch_drop = drop  # pyrefly: ignore[bad-assignment]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: timm's, and all parameters of the scheme."""
        return super().no_weight_decay() | {f"position.{name}" for name, _ in self.position.named_parameters()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups for layer decay, with positions in the group of the stem."""
        groups: dict[str, Any] = super().group_matcher(coarse)
        return groups | {"stem": groups["stem"] + "|^position"}

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Change the expected size of images (and of patches). Positions need no change."""
        super().set_input_size(img_size, patch_size)
        self.patch_coords.patch = tuple(self.patch_embed.patch_size)
        self.patch_coords.image = None if self.dynamic_img_size else tuple(self.patch_embed.img_size)

    def set_position(self, position: str) -> None:
        """Change the spec and keep the learned parameters of the positions: "ntk(mixed, factor=2)"
        for a model trained with "mixed". Saved models store the new spec.

        Raises ValueError, and changes nothing, for a spec that does not fit the model or has
        parameters of other names or shapes.
        """
        scheme = rebuild(self.position, position)
        if cast(Any, self.blocks[0]).attn.linear:
            check_linear(scheme(cast(Layout, scheme.made_for).coords()))
        self.position = scheme
        self._model_args = dict(getattr(self, "_model_args", {}), position=position)  # as timm's set_input_size does

    def _embed(
        self, x: Tensor, coords: Tensor | None, memory: Tensor | None = None
    ) -> tuple[Tensor, Encoding, Tensor, list[int] | None]:
        """Images to tokens (B, prefix + N, C), their encoding, the coordinates of the patches, and
        the size of the grid that these come from."""
        coords, grid = self.patch_coords(x, coords)
        x = self.patch_embed(x)
        shape = x.shape
        x = embed_positions(self.position, x.flatten(1, -2), coords, grid, 0)
        x = self._pos_embed(x.view(shape) if self.dynamic_img_size else x)
        if self.pos_embed is None:
            x = self.pos_drop(x)
        x = insert_memory(x, memory, self.num_prefix_tokens, self.memory_tokens)
        if self.patch_drop is not None:
            x, keep = self.patch_drop(x)
            if keep is not None:
                coords = take_coords(coords, keep)
        return self.norm_pre(x), self.position(coords, self.num_prefix_tokens, grid=grid), coords, grid

    def _run_blocks(
        self,
        x: Tensor,
        coords: Tensor | None,
        memory: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        depth: int | None = None,
    ) -> Iterator[Tensor]:
        """Images to tokens (B, prefix + N, C) after each of the first `depth` blocks, or of all."""
        x, encoding, coords, grid = self._embed(x, coords, memory)
        prefix = self.num_prefix_tokens

        def embed(x: Tensor, layer: int) -> Tensor:
            patches = embed_positions(self.position, x[:, prefix:], coords, grid, layer)
            return torch.cat((x[:, :prefix], patches), dim=1)

        return run_blocks(
            self.blocks[:depth],
            x,
            encoding,
            attn_mask,
            is_causal,
            embed=embed if self.position.each_layer else None,
            checkpoint=checkpoint if self.grad_checkpointing else None,
        )

    def forward_features(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        coords: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """Images (B, C, *sizes) to tokens (B, prefix + N, C).

        Args:
            attn_mask, is_causal: as in `attention.attend`
            coords: coordinates (N, A) or (B, N, A) of the patches; by default those of their grid
            memory: (B, memory_tokens, C) from an earlier call, replaces the learned memory tokens
        """
        return self.norm(last(self._run_blocks(x, coords, memory, attn_mask, is_causal)))

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        coords: Tensor | None = None,
    ) -> Tensor:
        """Images (B, C, *sizes) to logits (B, classes); arguments as in `forward_features`."""
        return self.forward_head(self.forward_features(x, attn_mask, is_causal, coords))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        coords: Tensor | None = None,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]] | dict[str, Any]:
        """timm's intermediates: maps (B, C, *grid) or tokens (B, N, C) after chosen blocks, with
        the final tokens; options as in timm."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is NCHW or NLC, got {output_fmt!r}")
        if output_fmt == "NCHW" and self.training and self.patch_drop is not None:
            raise ValueError("dropped patches leave no map; use output_fmt='NLC', eval mode or patch_drop_rate=0")
        indices_to_take, last_index = feature_take_indices(len(self.blocks), indices)
        grid = self.patch_embed.dynamic_feat_size(x.shape[2:])
        depth = last_index + 1 if stop_early else None
        intermediates: list[Tensor] = []
        tokens = x
        for i, tokens in enumerate(self._run_blocks(x, coords, None, attn_mask, is_causal, depth)):
            if i in indices_to_take:
                intermediates.append(self.norm(tokens) if norm else tokens)
        features = None if intermediates_only else self.norm(tokens)
        prefix = self.num_prefix_tokens if return_prefix_tokens else 0
        maps = [tokens[:, self.num_prefix_tokens :] for tokens in intermediates]
        if output_fmt == "NCHW":
            maps = [tokens.transpose(1, 2).unflatten(2, grid).contiguous() for tokens in maps]
        prefixes = [tokens[:, :prefix] for tokens in intermediates] if prefix else None
        return as_timm(maps, prefixes, features, output_dict)
