"""State dicts that others publish, with the names and shapes of a RopeViT's.

`translate` knows them apart: timm's Eva and VisionTransformer, and what the authors of RoPE-ViT (arXiv:2403.13298),
DINOv3 (arXiv:2508.10104), EVA-02, Perception Encoder, Sapiens2, Qwen3 and DeepSeek publish themselves.
"""

import math
import re
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from timm.layers import to_2tuple
from timm.models import deepseek_vit, eva, qwen3_vit, vision_transformer
from torch import Tensor

from ..positions.absolute.learned import Learned
from ..positions.absolute.wrappers import Gate

Weights = dict[str, Tensor]


def from_eva(state: Weights, column_first: bool = True) -> Weights:
    """timm's Eva: queries, keys and values become one projection, scales modules, frequencies (L, H, axes, R).

    `column_first` says that the axes of learned frequencies are (x, y), as in every published model.
    """
    out = {key: value for key, value in state.items() if not re.search(r"attn\.([qkv]_proj|[qkv]_bias)", key)}
    out = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", key): value for key, value in out.items()}
    if "rope.freqs" in out:
        freqs = out.pop("rope.freqs")
        out["position.freqs"] = (freqs.flip(0) if column_first else freqs).permute(1, 2, 0, 3).float().contiguous()
    for attn in _prefixes(state, "q_proj.weight"):
        weights = [state[f"{attn}{name}_proj.weight"] for name in "qkv"]
        out[f"{attn}qkv.weight"] = torch.cat(weights)
        if f"{attn}q_proj.bias" in state:
            biases = [
                state.get(f"{attn}{name}_proj.bias", w.new_zeros(len(w)))
                for name, w in zip("qkv", weights, strict=True)
            ]
            out[f"{attn}qkv.bias"] = torch.cat(biases)
    for attn in _prefixes(state, "q_bias"):
        q, v = state[f"{attn}q_bias"], state[f"{attn}v_bias"]
        out[f"{attn}qkv.bias"] = torch.cat((q, torch.zeros_like(q), v))
    for block in _prefixes(out, "ls1.gamma"):  # a scale on attention alone
        out.setdefault(f"{block}ls2.gamma", torch.ones_like(out[f"{block}ls1.gamma"]))
    return out


def from_rope_vit(state: Weights, heads: int) -> Weights:
    """RoPE-ViT's own: learned frequencies (2, L, H * R) of (x, y), and tables of coordinates that nobody needs."""
    state = {key: value for key, value in state.items() if not key.startswith("freqs_t_")}
    if "freqs" in state:
        state["rope.freqs"] = state.pop("freqs").unflatten(-1, (heads, -1))
    return from_eva(state)


def from_dinov3(state: Weights) -> Weights:
    """DINOv3's own: registers, a SwiGLU of three matrices, a masked bias of keys, and pretraining's leftovers."""
    left = r"mask_token|bias_mask$|^rope_embed\.|^local_cls_norm|^projectors\."
    names = {
        "storage_tokens": "reg_token",
        ".mlp.w1.": ".mlp.fc1_g.",
        ".mlp.w2.": ".mlp.fc1_x.",
        ".mlp.w3.": ".mlp.fc2.",
    }
    out = {}
    for key, value in state.items():
        if re.search(left, key):
            continue
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        if key.endswith("qkv.bias"):
            q, k, v = value.chunk(3)
            value = torch.cat((q, torch.zeros_like(k), v))
        out[key] = value
    return out


def from_encoder(state: Weights, model: Any) -> Weights:
    """timm's or their own Qwen3-ViT and DeepSeek-ViT, without projectors, which leave out what is only 0s or 1s.

    Qwen3's table of a square grid is resampled as that model does, linearly between the cells at the borders.
    """
    theirs = SimpleNamespace(merger=None, aligner=None, patch_embed=model.patch_embed)
    filters = qwen3_vit if any("pos_embed" in key for key in state) else deepseek_vit
    out = filters.checkpoint_filter_fn_encoder(dict(state), cast(Any, theirs))
    if any(key.startswith("encoder.") for key in state):  # else a head is that of a language model
        out |= {key: value for key, value in state.items() if key.startswith("head.")}
    if "pos_embed" in out:
        side = math.isqrt(out["pos_embed"].shape[1])
        out["pos_embed"] = qwen3_vit.resample_pos_embed_grid(out["pos_embed"], side, model.patch_embed.grid_size)
    for key, like in model.state_dict().items():
        if key not in out and re.search(r"\.mlp\..*bias$|^fc_norm\.", key):
            out[key] = torch.full(like.shape, float(key == "fc_norm.weight"))
    return out


def move_table(weights: Weights, model: Any) -> Weights:
    """Weights whose learned table (1, prefix + N, C) the model does not have, with it where the model has one, or gone.

    Its rows for class and register tokens say nothing of places, so they join those tokens.
    """
    if model.pos_embed is not None or "pos_embed" not in weights:
        return weights
    weights = dict(weights)
    table, prefix = weights.pop("pos_embed"), 0 if model.no_embed_class else model.num_prefix_tokens
    for name, tokens in zip(("cls_token", "reg_token"), table[:, :prefix].tensor_split((1,), dim=1), strict=True):
        if name in weights and tokens.shape == weights[name].shape:
            weights[name] = weights[name] + tokens
    cells = table[0, prefix:]
    grid = _grid(model, weights["patch_embed.proj.weight"].shape[2:], len(cells))
    for name, module in model.named_modules():
        if isinstance(module, Gate) and isinstance(module.scheme, Learned):
            weights[f"{name}.scheme.table"] = cells.unflatten(0, grid)
    return weights


def _grid(model: Any, patch: Sequence[int], cells: int) -> tuple[int, ...]:
    """The grid of a table of so many cells: that of the images that its weights are known to come from, or a square."""
    known = getattr(model, "pretrained_model_args", {}).get("img_size")
    size = known or getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[-2:]
    grid = tuple(n // p for n, p in zip(cast(Any, to_2tuple(size)), patch, strict=False))
    return grid if math.prod(grid) == cells else (math.isqrt(cells),) * 2


def by_timm(state: Weights, model: Any) -> Weights:
    """What timm knows to translate for its class Eva."""
    return from_eva(eva.checkpoint_filter_fn(state, model))


def by_timms_vit(state: Weights, model: Any) -> Weights:
    """What timm knows to translate for its VisionTransformer, of OpenAI's CLIP, DINOv2 and others."""
    images = model.patch_embed.proj.weight.ndim == 4  # timm knows no signals and no video
    return vision_transformer.checkpoint_filter_fn(state, model) if images else state


LAYOUTS: dict[str, tuple[str, Callable[[Weights, Any], Weights]]] = {  # the keys that tell, and the translation
    "RoPE-ViT's own": (r"freqs|freqs_t_x", lambda state, net: from_rope_vit(state, net.blocks[0].attn.num_heads)),
    "Sapiens2's own": (r"blocks\.0\.attn\.wq\.weight", by_timm),
    "DINOv3's own": (r"storage_tokens", lambda state, net: from_dinov3(state)),
    "Perception Encoder's own": (r"(visual\.)?conv1\.weight", by_timm),
    "EVA-02's own": (
        r"(visual\.)?blocks\.0\.(mlp\.w1\.weight|attn\.rope\.freqs_cos)|visual\.(trunk\.)?blocks\.0\.attn\.q_proj\.weight",
        by_timm,
    ),
    "Qwen3's and DeepSeek's, timm's and their own": (
        r"encoder\.blocks\..*|(vlm\.)?model\.visual\..*|vision\..*|merger\..*|aligner\..*",
        from_encoder,
    ),
    "timm's Eva": (
        r"blocks\.0\.(gamma_1|attn\.q_bias|attn\.q_proj\.weight)|rope\.freqs",
        lambda state, net: from_eva(state),
    ),
    "timm's and vit_rope's ViT": (r".*", by_timms_vit),
}


def translate(state: dict[str, Any], model: Any) -> Weights:
    """Weights of any known layout with the names of this RopeViT, beside its own positions where they know none.

    Raises ValueError where less than half of the model is found in them, with the layouts tried, the nearest first.
    """
    while inner := next((state[key] for key in ("model_ema", "model", "module", "state_dict") if key in state), None):
        state = inner
    compare_periods(state, model)
    wanted = set(model.state_dict())
    ours = next(ours for pattern, ours in LAYOUTS.values() if not state or any(re.fullmatch(pattern, k) for k in state))
    weights = dict(ours(state, model))
    if 2 * len(wanted & set(weights)) < len(wanted):
        raise ValueError(f"these weights are of none of the known layouts: {_tried(state, model, wanted)}")
    for key in [key for key in weights if key.endswith("attn.qkv.bias") and key not in wanted]:
        if not weights[key].any():  # published beside models of the same weights without it
            del weights[key]
    if "pos_embed" in weights and not any(key.startswith("position.") for key in weights):
        own = model.state_dict()  # weights of a model whose positions were its table: ours are new
        weights |= {key: own[key] for key in wanted if key.startswith("position.")}
    return move_table(weights, model)


def compare_periods(state: Weights, model: Any) -> None:
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


def _tried(state: Weights, model: Any, wanted: set[str]) -> str:
    """Each layout with how many of the model's names it finds, the nearest first."""
    found = {}
    for name, (_, ours) in LAYOUTS.items():
        try:
            found[name] = len(wanted & set(ours(dict(state), model)))
        except (KeyError, RuntimeError, ValueError, AttributeError):  # not even the keys that it begins with
            found[name] = 0
    order = sorted(found, key=lambda name: -found[name])
    return ", ".join(f"{name} ({found[name]} of {len(wanted)} names)" for name in order)


def _prefixes(state: Weights, name: str) -> list[str]:
    """What stands before `name` in the keys that end with it."""
    return [key.removesuffix(name) for key in state if key.endswith(f".{name}")]
