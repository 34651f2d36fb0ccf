"""Names of pretrained rotary models for `timm.create_model`.

Each rotary model of timm's class Eva is also registered as a RopeViT of the same architecture, with
the same tags; `vit_rope_` replaces the `vit_` of its name, or precedes the name. `pretrained=True`
downloads the weights of the tag and translates them. A file (`pretrained_cfg_overlay={"file": …}`)
may have the layout of timm, of the model's authors or of this library. `vit_rope_from_timm` does
the same for any model of timm that `from_timm` or `ropeify` accepts.
"""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import timm
from timm.models import (
    PretrainedCfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    register_model,
)

from ..models.registry import create
from ..models.vit import RopeViT
from .architecture import architecture

SOURCES = {
    f"vit_rope_{name.removeprefix('vit_')}": name
    for name in timm.list_models(module="eva", exclude_filters=["eva_*", "eva02_enormous_*"])
}


def _pretrained_cfg(source: str) -> PretrainedCfg:
    return get_pretrained_cfg(source) or PretrainedCfg()


@cache
def _arguments(source: str, position: str = "", ape: str = "keep") -> dict[str, Any]:
    """Arguments of a RopeViT like timm's model of this name, without those that its pretrained_cfg
    determines."""
    args = architecture(timm.create_model(source, device="meta"), position, ape)
    excluded = {"num_classes", "in_chans"} | ({"img_size"} if _pretrained_cfg(source).fixed_input_size else set())
    return {key: value for key, value in args.items() if key not in excluded}


def _entry_point(name: str, source: str) -> Callable[..., RopeViT]:
    def make(pretrained: bool = False, **kwargs: Any) -> RopeViT:
        return create(name, pretrained, _arguments(source), kwargs)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"timm's {source} as a RopeViT, with its weights."
    return make


default_cfgs = generate_default_cfgs(
    {
        f"{name}{tagged.removeprefix(source)}": cfg
        for name, source in SOURCES.items()
        for tagged, cfg in get_arch_pretrained_cfgs(source).items()
    }
    | {"vit_rope_from_timm": {"fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": "head"}}
)


for name, source in SOURCES.items():
    register_model(_entry_point(name, source))


@register_model
def vit_rope_from_timm(
    pretrained: bool = False,
    source: str = "vit_tiny_patch16_224",
    position: str = "axial",
    ape: str = "keep",
    **kwargs: Any,
) -> RopeViT:
    """timm's model `source` (a name, optionally with a tag) as a RopeViT, converted by `from_timm`
    if it is rotary and otherwise by `ropeify`."""
    arguments = _arguments(source, position, ape)
    if not kwargs.get("pretrained_cfg"):
        cfg = dataclasses.replace(_pretrained_cfg(source), architecture="vit_rope_from_timm", tag=None)
        kwargs["pretrained_cfg"] = cfg
    return create("vit_rope_from_timm", pretrained, arguments, kwargs)
