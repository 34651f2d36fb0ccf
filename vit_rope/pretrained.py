"""Names for rotary models whose weights others publish, as `timm.create_model` takes them.

Each rotary model of timm's class Eva is registered once more, with `vit_rope_` for its `vit_` or before its name: the
same architecture as a RopeViT, and the same tags. `pretrained=True` fetches what the tag points to and translates it as
it loads; a file (`pretrained_cfg_overlay={"file": …}`) may have the layout of timm, of the model's authors or of this
library. One more name, `vit_rope_from_timm`, does this for any model of timm that `from_timm` or `ropeify` takes.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import timm
import torch
from timm.models import eva, generate_default_cfgs, get_arch_pretrained_cfgs, get_pretrained_cfg, register_model

from . import layouts
from .convert import architecture, move_table
from .layouts import Weights
from .vit import RopeViT, create
from .vit import checkpoint_filter_fn as fit_sizes

SOURCES = {
    f"vit_rope_{name.removeprefix('vit_')}": name
    for name in timm.list_models(module="eva", exclude_filters=["eva_*", "eva02_enormous_*"])
}


def by_timm(state: Weights, model: RopeViT) -> Weights:
    """What timm knows to translate for its class Eva."""
    return layouts.from_eva(eva.checkpoint_filter_fn(state, model))


LAYOUTS: dict[str, tuple[str, Callable[[Weights, RopeViT], Weights]]] = {  # the keys that tell, and the translation
    "RoPE-ViT's own": (
        r"freqs|freqs_t_x",
        lambda state, net: layouts.from_rope_vit(state, net.blocks[0].attn.num_heads),
    ),
    "Sapiens2's own": (r"blocks\.0\.attn\.wq\.weight", by_timm),
    "DINOv3's own": (r"storage_tokens", lambda state, net: layouts.from_dinov3(state)),
    "Perception Encoder's own": (r"(visual\.)?conv1\.weight", by_timm),
    "EVA-02's own": (r"(visual\.)?(trunk\.)?blocks\.0\.(mlp\.w1\.weight|attn\.rope\.freqs_cos)|visual\..*", by_timm),
    "timm's Eva": (
        r"blocks\.0\.(gamma_1|attn\.q_bias|attn\.q_proj\.weight)|rope\.freqs",
        lambda state, net: layouts.from_eva(state),
    ),
    "timm's and vit_rope's ViT": (r"blocks\.0\.attn\.qkv\.weight", lambda state, net: state),
}


def checkpoint_filter_fn(state: dict[str, Any], model: RopeViT) -> Weights:
    """Weights of any known layout with the names, shapes and sizes of this model.

    Raises ValueError where less than half of the model is found in them, with the layouts tried and the nearest.
    """
    while inner := next((state[key] for key in ("model_ema", "model", "module", "state_dict") if key in state), None):
        state = inner
    compare_periods(state, model)
    wanted = set(model.state_dict())
    for pattern, translate in LAYOUTS.values():
        if any(re.fullmatch(pattern, key) for key in state):
            weights = dict(translate(state, model))
            break
    else:
        weights = dict(state)
    if 2 * len(wanted & set(weights)) < len(wanted):
        raise ValueError(f"these weights are of none of the known layouts: {_tried(state, model, wanted)}")
    for key in [key for key in weights if key.endswith("attn.qkv.bias") and key not in wanted]:
        if not weights[key].any():  # published beside models of the same weights without it
            del weights[key]
    return fit_sizes(move_table(weights, model), model)


def compare_periods(state: Weights, model: RopeViT) -> None:
    """Warn where DINOv3's own file carries periods that were rounded to bfloat16, and the model's are not.

    Meta publishes such tables; timm computes periods in float32. A cosine differs by up to 0.006.
    """
    periods = state.get("rope_embed.periods")
    if periods is None or getattr(model.position, "periods", "") == "bfloat16":
        return
    if torch.equal(periods.float(), periods.bfloat16().float()):
        warnings.warn(
            "the file's rotary periods are rounded to bfloat16, this model's are not, as in timm; for the tables that "
            "the file comes with create the model with position='dinov3(periods=\"bfloat16\")'",
            stacklevel=2,
        )


def _tried(state: Weights, model: RopeViT, wanted: set[str]) -> str:
    """Each layout with how many of the model's names it finds, the nearest first."""
    found = {}
    for name, (_, translate) in LAYOUTS.items():
        try:
            found[name] = len(wanted & set(translate(dict(state), model)))
        except (KeyError, RuntimeError, ValueError, AttributeError):  # not even the keys that it begins with
            found[name] = 0
    order = sorted(found, key=lambda name: -found[name])
    return ", ".join(f"{name} ({found[name]} of {len(wanted)} names)" for name in order)


@cache
def _arguments(source: str, position: str = "", ape: str = "keep") -> dict[str, Any]:
    """Arguments of a RopeViT like timm's model of this name, but those that come with its weights."""
    args = architecture(timm.create_model(source, device="meta"), position, ape)
    left = {"num_classes", "in_chans"} | ({"img_size"} if get_pretrained_cfg(source).fixed_input_size else set())
    return {key: value for key, value in args.items() if key not in left}


def _named(name: str, source: str) -> Callable[..., RopeViT]:
    def make(pretrained: bool = False, **kwargs: Any) -> RopeViT:
        return create(name, pretrained, _arguments(source), kwargs, checkpoint_filter_fn)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"timm's {source} as a RopeViT, and its weights."
    return make


default_cfgs = generate_default_cfgs(
    {
        f"{name}{tagged.removeprefix(source)}": cfg
        for name, source in SOURCES.items()
        for tagged, cfg in get_arch_pretrained_cfgs(source).items()
    }
    | {"vit_rope_from_timm": {"first_conv": "patch_embed.proj", "classifier": "head"}}
)
for name, source in SOURCES.items():
    register_model(_named(name, source))


@register_model
def vit_rope_from_timm(
    pretrained: bool = False,
    source: str = "vit_tiny_patch16_224",
    position: str = "axial",
    ape: str = "keep",
    **kwargs: Any,
) -> RopeViT:
    """timm's model `source` (a name and a tag) as a RopeViT: by `ropeify`, or as it is where it is rotary already."""
    arguments = _arguments(source, position, ape)
    if not kwargs.get("pretrained_cfg"):
        cfg = dataclasses.replace(get_pretrained_cfg(source), architecture="vit_rope_from_timm", tag=None)
        kwargs["pretrained_cfg"] = cfg
    return create("vit_rope_from_timm", pretrained, arguments, kwargs, checkpoint_filter_fn)
