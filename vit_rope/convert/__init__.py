"""Convert pretrained models to RopeViT, and change the positions of a model.

`from_timm` converts rotary models of timm (class Eva: EVA-02, RoPE-ViT, Perception Encoder, DINOv3,
Sapiens2 and others; Qwen3-ViT and DeepSeek-ViT) to a RopeViT that computes the same function.
`ropeify` gives any VisionTransformer of timm the positions of a spec, in addition to its learned
table or in its place. Both read the architecture from the modules, so a model that was modified
after its creation converts as it is. `set_positions` changes the spec of a model with positions.
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

BASE = "vit_rope_base_patch16_224"  # converted models have this name, with every argument overridden
PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "license", "origin_url")


def from_timm(model: nn.Module) -> RopeViT:
    """Convert a rotary model of timm (class Eva, Qwen3-ViT, DeepSeek-ViT) to a RopeViT that
    computes the same function. The weights are copied.

    Missing biases of keys and MLPs are added as zeros, and missing scales of norms and layer scales
    as ones; all of them can be trained. A learned table that the model resamples is resampled once,
    to the grid of its `img_size`.

    Raises TypeError for a model of a different class, and ValueError, which names it, for a feature
    that RopeViT does not have.
    """
    if isinstance(model, ENCODERS):
        return _convert(model, architecture(model), from_encoder)
    if not isinstance(model, Eva):
        hint = "; ropeify gives it rotary positions" if isinstance(model, VisionTransformer) else ""
        raise TypeError(f"from_timm converts models of timm's class Eva, got {type(model).__name__}{hint}")
    column_first = getattr(model.rope, "grid_indexing", "xy") == "xy"
    return _convert(model, architecture(model), lambda state, _: from_eva(state, column_first))


def ropeify(model: nn.Module, position: str, ape: Literal["keep", "drop", "gate"] = "keep") -> RopeViT:
    """Convert timm's VisionTransformer (ViT, DeiT, CLIP, SigLIP, DINOv2 …) to a RopeViT with the
    positions of a spec. The weights are copied; parameters of `position` are new.

    `ape` decides about the learned table of the model: "keep" it (with position="none" the logits
    are bit-identical), "drop" it, or "gate": it becomes `gate(learned)` in the spec, which
    fine-tuning can fade out.

    Raises TypeError for a model that is not a VisionTransformer or is a RopeViT already, and
    ValueError for a feature that RopeViT does not have, which it names, or a spec that does not
    fit.
    """
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"ropeify gives positions to timm's VisionTransformer, got {type(model).__name__}")
    if isinstance(model, RopeViT):
        raise TypeError("the model is a RopeViT already; change its spec with set_positions, or create a new model")
    return _convert(model, architecture(model, position, ape), lambda state, _: state)


def set_positions(model: nn.Module, spec: str) -> nn.Module:
    """Change the spec of a model with positions (RopeViT, RopeDiT, or a U-Net after
    `add_positions`) in place, keep what its positions have learned, and return the model.

    For example, `set_positions(model, "yarn(mixed, factor=2)")` extends a model that was trained
    with "mixed". Saved models store the new spec.

    Raises TypeError for other models. Raises ValueError, and changes nothing, for a U-Net without
    positions and for a spec that does not fit or has parameters of other names or shapes.
    """
    method: Any = getattr(model, "set_position", None)
    if method is not None:
        method(spec)
        return model
    try:
        from ..unet import set_positions as set_unet_positions  # needs diffusers
    except ImportError as error:
        raise TypeError(
            f"set_positions changes a RopeViT, a RopeDiT or a diffusers U-Net with positions, "
            f"got {type(model).__name__}, and U-Nets cannot be recognized: {error}"
        ) from error
    set_unet_positions(model, spec)
    return model


def _convert(source: Any, args: dict[str, Any], translate: Callable[[Weights, Any], Weights]) -> RopeViT:
    """A RopeViT with copies of the translated weights; its new parameters (positions) keep their
    initial values."""
    cfg = getattr(source, "pretrained_cfg", None) or {}
    overlay = {key: cfg[key] for key in PREPROCESSING if cfg.get(key) is not None}
    overlay["input_size"] = (args["in_chans"], *args["img_size"])
    # on meta: initializing weights that are replaced takes seconds for a large model
    model: Any = timm.create_model(BASE, pretrained_cfg_overlay=overlay, device="meta", **args)
    model.position.to_empty(device="cpu")
    for module in model.position.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    weights = move_table(translate(source.state_dict(), model), model)
    weights = {key: value.detach().clone() for key, value in weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    lost = [key for key in missing if not key.startswith("position.")] + unexpected
    if lost:
        raise ValueError(f"these weights are missing or do not exist in a RopeViT: {', '.join(lost[:5])}")
    return model.to(next(source.parameters()).device).train(source.training)
