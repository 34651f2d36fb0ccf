"""Models that others trained, as a RopeViT: the same function, with positions that are a spec.

`from_timm` turns a rotary model of timm (its class Eva: EVA-02, RoPE-ViT, Perception Encoder, DINOv3, Sapiens2 and
others; Qwen3-ViT and DeepSeek-ViT) into a RopeViT; `ropeify` gives any VisionTransformer of timm rotary positions,
beside its learned table or in its place. Both read the architecture off the modules, so a model that was changed after
it was made converts as it is.
"""

from collections.abc import Callable
from typing import Any, Literal

import timm
from timm.models import VisionTransformer
from timm.models.eva import Eva
from torch import nn

from ..models.state_dicts import Weights, from_encoder, from_eva, move_table
from ..models.vit import RopeViT
from .architecture import architecture
from .encoders import ENCODERS

BASE = "vit_rope_base_patch16_224"  # a converted model is this one, with every argument overridden
PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "license", "origin_url")


def from_timm(model: nn.Module) -> RopeViT:
    """A rotary model of timm (class Eva, Qwen3-ViT, DeepSeek-ViT) as a RopeViT of the same function, its own copy.

    Keys that had no bias get one of zero, and so do MLPs; norms without a scale and attention that alone has one get
    another of ones. A learned table that the model resamples is taken as it is on a grid of its `img_size`. Raises
    TypeError for a model of another class, and ValueError for a feature that RopeViT does not have, naming it.
    """
    if isinstance(model, ENCODERS):
        return _make(model, architecture(model), from_encoder)
    if not isinstance(model, Eva):
        hint = "; ropeify gives it rotary positions" if isinstance(model, VisionTransformer) else ""
        raise TypeError(f"from_timm converts models of timm's class Eva, got {type(model).__name__}{hint}")
    return _make(model, architecture(model), lambda state, _: from_eva(state))


def ropeify(model: nn.Module, position: str, ape: Literal["keep", "drop", "gate"] = "keep") -> RopeViT:
    """timm's VisionTransformer (ViT, DeiT, CLIP, SigLIP, DINOv2 …) as a RopeViT with the positions of a spec.

    Weights are copied; whatever `position` learns is new. The model's own learned table stays (`ape="keep"`: with
    position="none" logits are bit-identical), goes ("drop"), or becomes `gate(learned)` in the spec, which fine-tuning
    can fade out ("gate"). Raises TypeError for a model that is no VisionTransformer, or is a RopeViT already, and
    ValueError for a feature that RopeViT does not have, naming it, or a spec that does not fit.
    """
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"ropeify gives positions to timm's VisionTransformer, got {type(model).__name__}")
    if isinstance(model, RopeViT):
        raise TypeError("the model is a RopeViT already; create it with another position and load its weights")
    args = architecture(model, position, ape)
    return _make(model, args, lambda state, _: state)


def _make(source: Any, args: dict[str, Any], translated: Callable[[Weights, Any], Weights]) -> RopeViT:
    """A RopeViT with copies of translated weights; what is new in it (positions) keeps its initial values."""
    known = getattr(source, "pretrained_cfg", None) or {}
    overlay = {key: known[key] for key in PREPROCESSING if known.get(key) is not None}
    overlay["input_size"] = (args["in_chans"], *args["img_size"])
    # without memory of its own at first: drawing weights that are replaced takes seconds for a large model
    model: Any = timm.create_model(BASE, pretrained_cfg_overlay=overlay, device="meta", **args)
    model.position.to_empty(device="cpu")
    for module in model.position.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    weights = move_table(translated(source.state_dict(), model), model)
    weights = {key: value.detach().clone() for key, value in weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    lost = [key for key in missing if not key.startswith("position.")] + unexpected
    if lost:
        raise ValueError(f"weights that a RopeViT has no place for, or lacks: {', '.join(lost[:5])}")
    return model.to(next(source.parameters()).device).train(source.training)
