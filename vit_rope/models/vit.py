"""A timm VisionTransformer whose positions are a spec string: `timm.create_model("vit_rope_small_patch16_224", …)`.

A position scheme is a function of coordinates. The model makes coordinates for its patches (or takes the caller's),
asks the scheme once for an encoding, and hands that to every block. Images have two axes; `patch_size=(2, 16, 16)`
makes the same model one of video (B, C, T, H, W), `patch_size=(16,)` one of signals (B, C, T).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.fx
from timm.layers import (
    AttentionPoolLatent,
    LayerNorm,
    Mlp,
    PatchDropoutWithIndices,
    SwiGLU,
    SwiGLUPacked,
    get_act_layer,
    get_norm_layer,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint,
    generate_default_cfgs,
    named_apply,
    register_model,
    register_notrace_function,
    register_notrace_module,
)
from timm.models import vision_transformer as timm_vit
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..attention import attend, attend_linear, attend_qkv, check_linear
from ..positions import Encoding, Layout, Position, build
from ..positions import coords as places
from ..positions.absolute.learned import Learned
from ..positions.specs import rebuild
from .block import RopeBlock
from .memory import insert_memory
from .patches import PatchCoordinates, PatchEmbed2d, PatchEmbedNd, Place, format_size, sizes
from .state_dicts import translate

register_notrace_module(Position)


for function in (attend, attend_linear, attend_qkv, insert_memory, places.take_coords):
    register_notrace_function(function)


MLPS: dict[str, Any] = {"mlp": Mlp, "swiglu": SwiGLU, "swiglu_packed": SwiGLUPacked}


class RopeViT(VisionTransformer):
    """timm's VisionTransformer with `position`, a spec of any registered scheme, in place of its learned table.

    Takes every argument of timm's class but `attn_layer` and `block_fn`. `position_unit` and `position_origin` say how
    patches get coordinates, as in `positions.coords.grid`, and `position_shift`, `position_jitter`, `position_rescale`
    how training varies them, as in `augment_coords`; class and register tokens have no place. `attention` is "softmax"
    or "linear" (`attention.attend_linear`). `memory_tokens` are registers, the last of them, that a call may be given
    from an earlier one (`memory.Reader`). timm's own table (`pos_embed="learn"`, which also has a row for the class
    token) is off unless asked for. `img_size` and `patch_size` of one or three numbers make a model of signals or of
    video.

    What rotary models of timm's other classes have, by their names there: `norm_eps`, `mlp_layer` as a name ("mlp",
    "swiglu", "swiglu_packed"), keys and values of fewer heads (`num_kv_heads`, one for each layer or for all), a pool
    of its own size (`attn_pool_num_heads`, `attn_pool_mlp_ratio`, for global_pool="map"), and norms before pooling and
    after it (`final_norm="both"`).

    Raises ValueError where a spec, a size or a head dimension does not fit, before any weight is made.
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
        norm_layer: Any = None,
        norm_eps: float | None = None,
        mlp_layer: Any = "mlp",
        num_kv_heads: int | Sequence[int] | None = None,
        final_norm: bool | Literal["both"] = True,
        attn_pool_num_heads: int | None = None,
        attn_pool_mlp_ratio: float | None = None,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ("attn_layer", "block_fn", "embed_layer"):
            if name in kwargs:
                raise TypeError(f"RopeViT chooses its own {name}; leave the option out")
        if isinstance(mlp_layer, str) and mlp_layer not in MLPS:
            raise ValueError(f"mlp_layer is a class or one of {', '.join(MLPS)}, got {mlp_layer!r}")
        own_pool = attn_pool_num_heads is not None or attn_pool_mlp_ratio is not None
        if own_pool and kwargs.get("global_pool") != "map":
            raise ValueError('attn_pool_num_heads and attn_pool_mlp_ratio need global_pool="map"')
        axes = 2 if isinstance(patch_size, int) else len(patch_size)
        patch = sizes("patch_size", patch_size, axes)
        image = sizes("img_size", img_size, axes)
        if not dynamic_img_pad and any(n % p for n, p in zip(image, patch, strict=True)):
            raise ValueError(
                f"img_size {format_size(image)} does not divide into patches of {format_size(patch)}; "
                f"change one of them or give dynamic_img_pad=True"
            )
        origin = position_origin if isinstance(position_origin, (int, float, str)) else tuple(position_origin)
        grid = tuple(-(-n // p) for n, p in zip(image, patch, strict=True))
        layout = Layout(embed_dim, num_heads, grid, depth, position_unit, origin)
        layout.coords()  # an origin that does not fit is found here
        locate = PatchCoordinates(
            layout, in_chans, image, patch, dynamic_img_pad, (position_shift, position_jitter, position_rescale)
        )
        scheme = build(position, layout)
        if final_norm not in (True, False, "both"):
            raise ValueError(f"final_norm is True, False or 'both', got {final_norm!r}")
        if final_norm == "both":
            kwargs["fc_norm"] = True
        if norm_eps is not None:
            norm_layer = partial(get_norm_layer(norm_layer) or LayerNorm, eps=norm_eps)
        if memory_tokens < 0:
            raise ValueError(f"memory_tokens is a number of tokens, 0 or more, got {memory_tokens}")
        if attention not in ("softmax", "linear"):
            raise ValueError(f"attention is 'softmax' or 'linear', got {attention!r}")
        if attention == "linear":
            check_linear(scheme(layout.coords()))
            if num_kv_heads is not None:
                raise ValueError("linear attention has as many heads of keys as of queries; leave num_kv_heads out")
            if kwargs.get("attn_drop_rate", 0.0) > 0:
                raise ValueError("linear attention has no weights to drop; leave attn_drop_rate out")
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
            embed_layer=partial(PatchEmbed2d if axes == 2 else PatchEmbedNd, output_fmt="NHWC"),
            norm_layer=norm_layer,
            final_norm=bool(final_norm),
            mlp_layer=MLPS[mlp_layer] if isinstance(mlp_layer, str) else mlp_layer,
            block_fn=cast(Any, partial(RopeBlock, num_kv_heads=_each_layer(num_kv_heads, depth))),
            device=device,
            **kwargs,
        )
        if final_norm == "both":
            self.norm = cast(Any, get_norm_layer(norm_layer) or LayerNorm)(
                embed_dim, device=device, dtype=kwargs.get("dtype")
            )
        if own_pool:
            self.attn_pool = AttentionPoolLatent(
                embed_dim,
                num_heads=attn_pool_num_heads or num_heads,
                mlp_ratio=attn_pool_mlp_ratio or kwargs.get("mlp_ratio", 4.0),
                norm_layer=cast(Any, get_norm_layer(norm_layer) or LayerNorm),
                act_layer=cast(Any, get_act_layer(kwargs.get("act_layer")) or nn.GELU),
                device=device,
                dtype=kwargs.get("dtype"),
            )
            draw = timm_vit.get_init_weights_vit(self.weight_init_mode, needs_reset=False)
            named_apply(draw, self.attn_pool, "attn_pool")
        self.locate = locate
        self.memory_tokens = memory_tokens
        if memory_tokens > 0:  # on the scale of the normed memory that later segments begin with
            nn.init.normal_(cast(Tensor, self.reg_token)[:, reg_tokens:].detach())
        if dynamic_img_size:
            self.locate.image = None
        self.position = scheme if device is None else scheme.to(device)
        self.each_layer = scheme.each_layer
        self.place = Place(self)
        for block in self.blocks if attention == "linear" else ():
            cast(Any, block).attn.linearise()
        # a Sequential could be called as a whole, and would run without positions
        self.blocks = nn.ModuleList(self.blocks)  # pyrefly: ignore[bad-assignment]
        rate = kwargs.get("patch_drop_rate", 0.0)
        drop = PatchDropoutWithIndices(rate, self.num_prefix_tokens) if rate > 0 else None
        self.patch_drop = drop  # pyrefly: ignore[bad-assignment]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone: timm's, and all that a position scheme learns."""
        return super().no_weight_decay() | {f"position.{name}" for name, _ in self.position.named_parameters()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups for layer decay, positions learning as slowly as the patch embedding."""
        groups: dict[str, Any] = super().group_matcher(coarse)
        return groups | {"stem": groups["stem"] + "|^position"}

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Expect images (and patches) of another size; positions follow by themselves."""
        super().set_input_size(img_size, patch_size)
        self.locate.patch = tuple(self.patch_embed.patch_size)
        self.locate.image = None if self.dynamic_img_size else tuple(self.patch_embed.img_size)

    def set_position(self, position: str) -> None:
        """Take another spec that learns the same numbers: "ntk(mixed, factor=2)" for a model trained with "mixed".

        What the positions have learned stays. Saved models remember the spec. Raises ValueError, and changes nothing,
        for a spec that does not fit, or learns other parameters.
        """
        self.position = rebuild(self.position, position)
        self.each_layer = self.position.each_layer
        self._model_args = dict(getattr(self, "_model_args", {}), position=position)  # as timm's set_input_size does

    def _embed(
        self, x: Tensor, coords: Tensor | None, memory: Tensor | None = None
    ) -> tuple[Tensor, Encoding, Tensor, list[int] | None]:
        """Images to tokens (B, prefix + N, C), the encoding of their places, and those places."""
        located = self.locate(x, coords)  # by index, for FX cannot unpack it
        where, grid = located[0], located[1]
        x = self.patch_embed(x)
        shape = x.shape
        x = self._place(x.flatten(1, -2), where, grid, 0)
        x = self._pos_embed(x.view(shape) if self.dynamic_img_size else x)
        if self.pos_embed is None:
            x = self.pos_drop(x)
        x = insert_memory(x, memory, self.num_prefix_tokens, self.memory_tokens)
        if self.patch_drop is not None:
            x, keep = self.patch_drop(x)
            if keep is not None:
                where = places.take_coords(where, keep)
        return self.norm_pre(x), self.position(where, self.num_prefix_tokens, None, None, grid), where, grid

    def _place(self, x: Tensor, where: Tensor, grid: list[int] | None, layer: int) -> Tensor:
        """Patch tokens (B, N, C) with their absolute places in them."""
        if isinstance(x, torch.fx.Proxy):
            return self.place(x, where, grid, layer)
        return self.position.embed(x, where, grid, layer)

    def _embed_again(self, x: Tensor, where: Tensor, grid: list[int] | None, layer: int) -> Tensor:
        """Tokens (B, prefix + N, C) with their places in them once more, for schemes that act before every layer."""
        prefix = self.num_prefix_tokens
        return torch.cat((x[:, :prefix], self._place(x[:, prefix:], where, grid, layer)), dim=1)

    def forward_features(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        coords: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> Tensor:
        """Images (B, C, *sizes) to tokens (B, prefix + N, C), at the caller's `coords` (N, A) or (B, N, A) if given.

        `memory` (B, memory_tokens, C) is what an earlier call left, in place of the learned tokens that it begins with.
        """
        x, encoding, where, grid = self._embed(x, coords, memory)
        for i, block in enumerate(self.blocks):
            if i > 0 and self.each_layer:
                x = self._embed_again(x, where, grid, i)
            if self.grad_checkpointing:
                x = checkpoint(block, x, encoding, attn_mask, is_causal)
            else:
                x = block(x, encoding, attn_mask, is_causal)
        return self.norm(x)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        coords: Tensor | None = None,
    ) -> Tensor:
        """Images (B, C, *sizes) to logits (B, classes), at the caller's `coords` (N, A) or (B, N, A) if given."""
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
        """timm's intermediates: maps (B, C, *grid) or tokens (B, N, C) after chosen blocks, with the final tokens."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is NCHW or NLC, got {output_fmt!r}")
        if output_fmt == "NCHW" and self.training and self.patch_drop is not None:
            raise ValueError("dropped patches leave no map; use output_fmt='NLC', eval mode or patch_drop_rate=0")
        take, last = feature_take_indices(len(self.blocks), indices)
        sizes = self.patch_embed.dynamic_feat_size(x.shape[2:])
        x, encoding, where, grid = self._embed(x, coords)
        blocks = self.blocks[: last + 1] if stop_early else self.blocks
        taken: list[Tensor] = []
        for i, block in enumerate(blocks):
            if i > 0 and self.each_layer:
                x = self._embed_again(x, where, grid, i)
            if self.grad_checkpointing:
                x = checkpoint(block, x, encoding, attn_mask, is_causal)
            else:
                x = block(x, encoding, attn_mask, is_causal)
            if i in take:
                taken.append(self.norm(x) if norm else x)
        prefix = [tokens[:, : self.num_prefix_tokens] for tokens in taken]
        maps = [tokens[:, self.num_prefix_tokens :] for tokens in taken]
        if output_fmt == "NCHW":
            maps = [tokens.transpose(1, 2).unflatten(2, sizes).contiguous() for tokens in maps]
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": maps}
            if return_prefix_tokens and self.num_prefix_tokens:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = self.norm(x)
            return result
        if return_prefix_tokens and self.num_prefix_tokens:
            maps = list(zip(maps, prefix, strict=True))
        if intermediates_only:
            return maps  # pyrefly: ignore[bad-return]  zipped with prefixes, as timm does
        return self.norm(x), maps  # pyrefly: ignore[bad-return]


def _each_layer(num_kv_heads: int | Sequence[int] | None, depth: int) -> tuple[int, ...] | None:
    if num_kv_heads is None:
        return None
    heads = (num_kv_heads,) * depth if isinstance(num_kv_heads, int) else tuple(num_kv_heads)
    if len(heads) != depth:
        raise ValueError(f"num_kv_heads names {len(heads)} layers of {depth}; give one number, or one for each layer")
    return heads


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: RopeViT) -> dict[str, Tensor]:
    """Weights of any known layout as this model needs them; patch kernels and tables of other sizes are resampled."""
    state_dict = translate(state_dict, model)
    if not isinstance(model.patch_embed, PatchEmbedNd):
        state_dict = timm_vit.checkpoint_filter_fn(state_dict, model)
    tables = {f"{name}.table": module for name, module in model.named_modules() if isinstance(module, Learned)}
    return {key: tables[key].fit(value) if key in tables else value for key, value in state_dict.items()}


def _cfg(size: int = 224, **kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "fixed_input_size": True,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
    } | kwargs


default_cfgs = generate_default_cfgs(
    {
        "vit_rope_test_patch16_64": _cfg(64),
        "vit_rope_tiny_patch16_224": _cfg(),
        "vit_rope_small_patch16_224": _cfg(),
        "vit_rope_base_patch16_224": _cfg(),
        "vit_rope_large_patch16_224": _cfg(),
    }
)


def create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> RopeViT:
    """A registered model, by timm's builder: `defaults` of its architecture under `kwargs` of the caller."""
    model: Any = RopeViT
    size = kwargs.get("img_size", 0)
    if not isinstance(size, int) and len(size) != 2:  # timm's builder knows of (height, width) alone
        model = partial(RopeViT, img_size=tuple(kwargs.pop("img_size")))
        kwargs["pretrained_cfg_overlay"] = (kwargs.get("pretrained_cfg_overlay") or {}) | {"fixed_input_size": False}
    return build_model_with_cfg(
        model,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **defaults | kwargs,
    )


@register_model
def vit_rope_test_patch16_64(pretrained: bool = False, **kwargs: Any) -> RopeViT:
    """A very small model on 64 × 64 images, for tests."""
    size = {"patch_size": 16, "embed_dim": 64, "depth": 4, "num_heads": 2}
    return create("vit_rope_test_patch16_64", pretrained, size, kwargs)


@register_model
def vit_rope_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> RopeViT:
    """ViT-Ti/16 (arXiv:2012.12877) with positions by spec."""
    size = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return create("vit_rope_tiny_patch16_224", pretrained, size, kwargs)


@register_model
def vit_rope_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> RopeViT:
    """ViT-S/16 (arXiv:2012.12877) with positions by spec."""
    size = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return create("vit_rope_small_patch16_224", pretrained, size, kwargs)


@register_model
def vit_rope_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> RopeViT:
    """ViT-B/16 (arXiv:2010.11929) with positions by spec."""
    size = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return create("vit_rope_base_patch16_224", pretrained, size, kwargs)


@register_model
def vit_rope_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> RopeViT:
    """ViT-L/16 (arXiv:2010.11929) with positions by spec."""
    size = {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}
    return create("vit_rope_large_patch16_224", pretrained, size, kwargs)
