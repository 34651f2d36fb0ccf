"""Names of RopeViT for `timm.create_model`, such as "vit_rope_small_patch16_224"."""

from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .converted import OPTIONS, ConvertedViT
from .state_dicts import checkpoint_filter_fn
from .vit import RopeViT


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
    """Build a registered model with timm's builder; `kwargs` of the caller override `defaults`.

    It is a RopeViT, or a ConvertedViT where one of the options of that class is given.
    """
    options = defaults | kwargs
    cls: Any = RopeViT if options.keys().isdisjoint(OPTIONS) else ConvertedViT
    size = options.get("img_size", 0)
    if not isinstance(size, int) and len(size) != 2:  # timm's builder supports only (height, width)
        cls = partial(cls, img_size=tuple(options.pop("img_size")))
        overlay = options.get("pretrained_cfg_overlay") or {}
        options["pretrained_cfg_overlay"] = overlay | {"fixed_input_size": False}
    return build_model_with_cfg(
        cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"},
        **options,
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
