"""Read the architecture of a timm model from its modules, as arguments of a RopeViT."""

import math
from typing import Any, cast

from timm import layers
from timm.models import VisionTransformer
from timm.models.deepseek_vit import DeepseekVitBlock
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Block
from torch import nn

from .encoders import ENCODERS, as_eva

NORMS = {
    nn.LayerNorm: "layernorm",
    layers.LayerNorm: "layernorm",
    layers.LayerNormFp32: "layernormfp32",
    layers.RmsNorm: "rmsnorm",
    layers.RmsNormFp32: "rmsnormfp32",
    layers.SimpleNorm: "simplenorm",
    layers.SimpleNormFp32: "simplenormfp32",
}
ACTS = {
    nn.GELU: "gelu",
    layers.activations.GELU: "gelu",
    layers.activations.GELUTanh: "gelu_tanh",
    layers.activations.QuickGELU: "quick_gelu",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}
UNITS = {"separate": "centered", "min": "centered_shorter", "max": "centered_longer"}


def architecture(model: nn.Module, position: str = "", ape: str = "keep") -> dict[str, Any]:
    """Arguments, of types that JSON can store, of the RopeViT that computes the same function as an
    Eva, an encoder or a VisionTransformer.

    `position` and `ape` are those of `ropeify`; an Eva has its own positions. Raises TypeError for
    a model of a different class and ValueError for a feature that RopeViT does not have.
    """
    if not isinstance(model, (Eva, VisionTransformer, *ENCODERS)):
        raise TypeError(
            f"only timm's Eva, VisionTransformer and encoders of language models convert, not {type(model).__name__}"
        )
    net = as_eva(model) if isinstance(model, ENCODERS) else cast(Any, model)
    block: Any = net.blocks[0] if len(net.blocks) else None
    eva = not isinstance(model, VisionTransformer)
    refuse(
        type(block) not in ((EvaBlock, DeepseekVitBlock) if eva else (Block,)), f"blocks of type {type(block).__name__}"
    )
    refuse(type(net.patch_embed) is not layers.PatchEmbed, f"patches by {type(net.patch_embed).__name__}")
    refuse(hasattr(net, "dist_token"), "a distillation token")
    norm, fc_norm, pre_norm = _exists(net.norm), _exists(net.fc_norm), _exists(net.norm_pre)
    refuse(_exists(net.patch_embed.norm), "a norm inside the patch embedding")
    refuse(pre_norm == (net.patch_embed.proj.bias is not None), "a norm_pre and a bias of patches, or neither")
    args: dict[str, Any] = {
        "img_size": tuple(net.patch_embed.img_size),
        "patch_size": tuple(net.patch_embed.patch_size),
        "in_chans": net.in_chans,
        "num_classes": net.num_classes,
        "global_pool": net.global_pool,
        "embed_dim": net.embed_dim,
        "depth": len(net.blocks),
        "class_token": net.cls_token is not None,
        "reg_tokens": 0 if net.reg_token is None else net.reg_token.shape[1],
        "pos_embed": "none" if net.pos_embed is None else "learn",
        "no_embed_class": net.no_embed_class,
        "pre_norm": pre_norm,
        "final_norm": "both" if norm and fc_norm else norm or fc_norm,
        "fc_norm": fc_norm,
        "pool_include_prefix": net.global_pool == "map" if eva else net.pool_include_prefix,
        "dynamic_img_size": net.dynamic_img_size,
        "dynamic_img_pad": net.patch_embed.dynamic_img_pad,
        "init_values": getattr(block if eva else block.ls1, "init_values", None),
    }
    args |= (
        _attention_args(net) | _mlp_args(block.mlp) | _norm_args(block.norm1) | _dropout_rates(net) | _pool_args(net)
    )
    return args | (_rotary_args(net) if eva else _position_args(position, ape, net))


def _attention_args(net: Any) -> dict[str, Any]:
    """Arguments of attention. Blocks may differ in the number of heads of keys and values."""
    attention = net.blocks[0].attn
    kinds = (EvaAttention, layers.AttentionRope, layers.Attention)
    refuse(type(attention) not in kinds, f"attention of type {type(attention).__name__}")
    refuse(getattr(attention, "gate", None) is not None, "gated attention")
    refuse(attention.num_heads * attention.head_dim != net.embed_dim, "heads whose total width is not embed_dim")
    groups = [getattr(block.attn, "num_kv_heads", attention.num_heads) for block in net.blocks]
    bias = any(name in ("qkv.bias", "q_proj.bias", "q_bias") for name, _ in attention.named_parameters())
    return {
        "num_heads": attention.num_heads,
        "num_kv_heads": groups if set(groups) != {attention.num_heads} else None,
        "qkv_bias": bias,
        "qk_norm": _exists(attention.q_norm),
        "scale_attn_norm": _exists(attention.norm),
        "proj_bias": attention.proj.bias is not None,
    }


def _mlp_args(mlp: Any) -> dict[str, Any]:
    names = {layers.Mlp: "mlp", layers.SwiGLU: "swiglu", layers.GluMlp: "swiglu_packed"}
    refuse(type(mlp) not in names, f"an MLP of type {type(mlp).__name__}")
    refuse(isinstance(mlp, layers.GluMlp) and mlp.gate_last, "a GLU whose gate comes last")
    hidden = mlp.fc2.in_features * (2 if isinstance(mlp, layers.GluMlp) else 1)
    width = mlp.fc2.out_features
    ratio = hidden / width
    tanh = type(mlp.act) is nn.GELU and mlp.act.approximate == "tanh"
    return {
        "mlp_layer": names[type(mlp)],
        "mlp_ratio": ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf),
        "act_layer": "gelu_tanh" if tanh else _name_of(mlp.act, ACTS, "an activation"),
        "scale_mlp_norm": _exists(mlp.norm),
    }


def _norm_args(norm: Any) -> dict[str, Any]:
    return {"norm_layer": _name_of(norm, NORMS, "norms"), "norm_eps": norm.eps}


def _pool_args(net: Any) -> dict[str, Any]:
    pool = net.attn_pool
    if not isinstance(pool, layers.AttentionPoolLatent):
        return {}
    mlp = cast(Any, pool.mlp)
    refuse(mlp is None or type(mlp.act) is not type(net.blocks[0].mlp.act), "an attention pool with its own activation")
    return {"attn_pool_num_heads": pool.num_heads, "attn_pool_mlp_ratio": mlp.fc1.out_features / mlp.fc1.in_features}


def _dropout_rates(net: Any) -> dict[str, float]:
    """Dropout rates, for training that continues."""
    last = net.blocks[-1]
    return {
        "drop_rate": net.head_drop.p,
        "pos_drop_rate": net.pos_drop.p,
        "patch_drop_rate": getattr(net.patch_drop, "prob", 0.0),
        "proj_drop_rate": last.attn.proj_drop.p,
        "attn_drop_rate": last.attn.attn_drop.p,
        "drop_path_rate": getattr(last.drop_path1, "drop_prob", 0.0),
    }


def _rotary_args(net: Any) -> dict[str, Any]:
    """The position options that compute the same angles as the module `rope` of an Eva."""
    rope = net.rope
    if rope is None:
        return {"position": "none"}
    half = net.blocks[0].attn.rotate_half
    pairs = ', pairs="half"' if half else ""
    unit, origin = "index", 0.0
    if isinstance(rope, layers.RotaryEmbeddingMixed):
        position = f"mixed(base={rope.temperature:.9g}{pairs})"
    elif isinstance(rope, layers.RotaryEmbeddingCat):
        refuse(rope.in_pixels or rope.grid_type != "index", "rotary frequencies in pixels")
        position, origin = f"axial(base={rope.temperature:.9g}{pairs})", 0.0 - rope.grid_offset
    elif isinstance(rope, layers.RotaryEmbeddingDinoV3):
        refuse(
            rope.temperature is None or rope.grid_offset != 0,
            "DINOv3 positions with min_period and max_period, or with a grid offset",
        )
        pairs = pairs or ', pairs="interleaved"'
        position, unit = f"dinov3(base={rope.temperature:.9g}{pairs})", UNITS[rope.normalize_coords]
    elif isinstance(rope, layers.RotaryEmbeddingMRope):
        refuse(min(rope.mrope_section[1:]) * 6 < rope.dim, "a multimodal RoPE whose sections do not cover all pairs")
        position = f"mrope(base={rope.temperature:.9g}, idle=1)"
    else:
        raise ValueError(f"RopeViT does not support positions of type {type(rope).__name__}")
    if rope.grid_indexing == "xy" and not isinstance(rope, layers.RotaryEmbeddingMixed):
        position = f"xy({position})"
    reference = getattr(rope, "ref_feat_shape", None)
    if reference is not None:
        position = f"reference({position}, grid={tuple(reference)})"
    stretched = {"position_shift_grid": tuple(reference)} if reference is not None and rope.shift_coords else {}
    return stretched | {
        "position": position,
        "position_unit": unit,
        "position_origin": origin,
        "position_shift": rope.shift_coords or 0.0,
        "position_jitter": rope.jitter_coords or 1.0,
        "position_rescale": rope.rescale_coords or 1.0,
    }


def _position_args(position: str, ape: str, net: Any) -> dict[str, Any]:
    if ape not in ("keep", "drop", "gate"):
        raise ValueError(f'ape is "keep", "drop" or "gate", got {ape!r}')
    if ape == "keep" or net.pos_embed is None:
        return {"position": position}
    return {"pos_embed": "none", "position": position if ape == "drop" else f"{position} + gate(learned)"}


def refuse(has: bool, feature: str) -> None:
    """Raise ValueError if a model has a feature that RopeViT does not have."""
    if has:
        raise ValueError(f"RopeViT does not support {feature}")


def _exists(module: nn.Module) -> bool:
    """timm uses Identity for a module that a model does not have."""
    return not isinstance(module, nn.Identity)


def _name_of(module: nn.Module, names: dict[type, str], what: str) -> str:
    refuse(type(module) not in names, f"{what} of type {type(module).__name__}")
    return names[type(module)]
