"""Published state dicts, translated to the names and shapes of a RopeViT.

`translate` recognizes the layout of a state dict by its keys: timm's Eva and VisionTransformer, and
the layouts that the authors of RoPE-ViT (arXiv:2403.13298), DINOv3 (arXiv:2508.10104), EVA-02,
Perception Encoder, Sapiens2, Qwen3 and DeepSeek publish.

Shapes   L layers, H heads, R channel pairs of a head, N patches, C channels
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
from .patches import PatchEmbedNd

Weights = dict[str, Tensor]


def from_eva(state: Weights, column_first: bool = True) -> Weights:
    """Weights of timm's Eva.

    Queries, keys and values become one projection, layer scales become modules, and frequencies get
    the shape (L, H, axes, R). `column_first` states that the axes of learned frequencies are (x,
    y), as in every published model.
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
    for block in _prefixes(out, "ls1.gamma"):  # a layer scale on attention only
        out.setdefault(f"{block}ls2.gamma", torch.ones_like(out[f"{block}ls1.gamma"]))
    return out


def from_rope_vit(state: Weights, heads: int) -> Weights:
    """Weights by the authors of RoPE-ViT: learned frequencies (2, L, H * R) of (x, y), and tables
    of coordinates, which are dropped."""
    state = {key: value for key, value in state.items() if not key.startswith("freqs_t_")}
    if "freqs" in state:
        state["rope.freqs"] = state.pop("freqs").unflatten(-1, (heads, -1))
    return from_eva(state)


def from_dinov3(state: Weights) -> Weights:
    """Weights by the authors of DINOv3: registers, a SwiGLU of three matrices, a masked bias of
    keys, and parts that only pretraining uses, which are dropped."""
    unused = r"mask_token|bias_mask$|^rope_embed\.|^local_cls_norm|^projectors\."
    names = {
        "storage_tokens": "reg_token",
        ".mlp.w1.": ".mlp.fc1_g.",
        ".mlp.w2.": ".mlp.fc1_x.",
        ".mlp.w3.": ".mlp.fc2.",
    }
    out = {}
    for key, value in state.items():
        if re.search(unused, key):
            continue
        for source, target in names.items():
            key = key.replace(source, target)
        if key.endswith("qkv.bias"):
            q, k, v = value.chunk(3)
            value = torch.cat((q, torch.zeros_like(k), v))
        out[key] = value
    return out


def from_encoder(state: Weights, model: Any) -> Weights:
    """Weights of Qwen3-ViT and DeepSeek-ViT, in timm's layout or their authors', without
    projectors.

    Biases and scales that these models do not have become zeros and ones. Qwen3's table of a square
    grid is resampled as in that model, linearly between the cells at the borders.
    """
    target = SimpleNamespace(merger=None, aligner=None, patch_embed=model.patch_embed)
    filters = qwen3_vit if any("pos_embed" in key for key in state) else deepseek_vit
    out = filters.checkpoint_filter_fn_encoder(dict(state), cast(Any, target))
    if any(key.startswith("encoder.") for key in state):  # otherwise the head belongs to a language model
        out |= {key: value for key, value in state.items() if key.startswith("head.")}
    if "pos_embed" in out:
        side = math.isqrt(out["pos_embed"].shape[1])
        out["pos_embed"] = qwen3_vit.resample_pos_embed_grid(out["pos_embed"], side, model.patch_embed.grid_size)
    for key, value in model.state_dict().items():
        if key not in out and re.search(r"\.mlp\..*bias$|^fc_norm\.", key):
            out[key] = torch.full(value.shape, float(key == "fc_norm.weight"))
    return out


def move_table(weights: Weights, model: Any) -> Weights:
    """Weights with a learned table (1, prefix + N, C), for a model without `pos_embed`: the table
    moves to the scheme `learned` of the model's positions, or is dropped where there is none.

    The rows for class and register tokens hold no position, so they are added to those tokens.
    """
    if model.pos_embed is not None or "pos_embed" not in weights:
        return weights
    weights = dict(weights)
    table = weights.pop("pos_embed")
    for name in () if model.no_embed_class else ("cls_token", "reg_token"):  # in the order of their rows
        if name in weights:
            count = weights[name].shape[1]
            weights[name], table = weights[name] + table[:, :count], table[:, count:]
    cells = table[0]
    grid = _grid(model, weights["patch_embed.proj.weight"].shape[2:], len(cells))
    for name, module in model.named_modules():
        if isinstance(module, Gate) and isinstance(module.scheme, Learned):
            weights[f"{name}.scheme.table"] = cells.unflatten(0, grid)
    return weights


def _grid(model: Any, patch: Sequence[int], cells: int) -> tuple[int, ...]:
    """The grid of a table with this number of cells: the grid of the pretraining images if it has
    that number of cells, otherwise a square."""
    known = getattr(model, "pretrained_model_args", {}).get("img_size")
    size = known or getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[-2:]
    grid = tuple(n // p for n, p in zip(cast(Any, to_2tuple(size)), patch, strict=False))
    return grid if math.prod(grid) == cells else (math.isqrt(cells),) * 2


def filter_as_eva(state: Weights, model: Any) -> Weights:
    """Weights in any layout that timm translates for its class Eva."""
    return from_eva(eva.checkpoint_filter_fn(state, model))


def filter_as_vit(state: Weights, model: Any) -> Weights:
    """Weights in any layout that timm translates for its VisionTransformer: OpenAI's CLIP, DINOv2
    and others."""
    images = model.patch_embed.proj.weight.ndim == 4  # timm supports neither signals nor video
    return vision_transformer.checkpoint_filter_fn(state, model) if images else state


LAYOUTS: dict[str, tuple[str, Callable[[Weights, Any], Weights]]] = {  # a pattern of the keys, and the translation
    "RoPE-ViT's own": (r"freqs|freqs_t_x", lambda state, net: from_rope_vit(state, net.blocks[0].attn.num_heads)),
    "Sapiens2's own": (r"blocks\.0\.attn\.wq\.weight", filter_as_eva),
    "DINOv3's own": (r"storage_tokens", lambda state, net: from_dinov3(state)),
    "Perception Encoder's own": (r"(visual\.)?conv1\.weight", filter_as_eva),
    "EVA-02's own": (
        r"(visual\.)?blocks\.0\.(mlp\.w1\.weight|attn\.rope\.freqs_cos)|visual\.(trunk\.)?blocks\.0\.attn\.q_proj\.weight",
        filter_as_eva,
    ),
    "Qwen3's and DeepSeek's, timm's and their own": (
        r"encoder\.blocks\..*|(vlm\.)?model\.visual\..*|vision\..*|merger\..*|aligner\..*",
        from_encoder,
    ),
    "timm's Eva": (
        r"blocks\.0\.(gamma_1|attn\.q_bias|attn\.q_proj\.weight)|rope\.freqs",
        lambda state, net: from_eva(state),
    ),
    "timm's and vit_rope's ViT": (r".*", filter_as_vit),
}


def checkpoint_filter_fn(state_dict: Weights, model: Any) -> Weights:
    """timm's hook for loading weights: any known layout as this model needs it, with patch kernels
    and tables of other sizes resampled."""
    state_dict = translate(state_dict, model)
    if not isinstance(model.patch_embed, PatchEmbedNd):
        state_dict = vision_transformer.checkpoint_filter_fn(state_dict, model)
    tables = {f"{name}.table": module for name, module in model.named_modules() if isinstance(module, Learned)}
    return {key: tables[key].fit(value) if key in tables else value for key, value in state_dict.items()}


def translate(state: dict[str, Any], model: Any) -> Weights:
    """Weights of any known layout with the names of this RopeViT, which keeps its own positions if
    the weights have none.

    Raises ValueError where they hold less than half of the model's names; the message lists the
    layouts that were tried, the best match first.
    """
    while inner := next((state[key] for key in ("model_ema", "model", "module", "state_dict") if key in state), None):
        state = inner
    compare_periods(state, model)
    names = set(model.state_dict())
    convert = next(fn for pattern, fn in LAYOUTS.values() if not state or any(re.fullmatch(pattern, k) for k in state))
    weights = dict(convert(state, model))
    if 2 * len(names & set(weights)) < len(names):
        raise ValueError(f"these weights are of none of the known layouts: {_match_counts(state, model, names)}")
    for key in [key for key in weights if key.endswith("attn.qkv.bias") and key not in names]:
        if not weights[key].any():  # the same weights are also published without this bias
            del weights[key]
    if "pos_embed" in weights and not any(key.startswith("position.") for key in weights):
        initial = model.state_dict()  # the weights' positions were the table: those of the model are new
        weights |= {key: initial[key] for key in names if key.startswith("position.")}
    return move_table(weights, model)


def compare_periods(state: Weights, model: Any) -> None:
    """Warn where a file of DINOv3's authors has periods rounded to bfloat16 and the model does not.

    Meta publishes such tables; timm computes periods in float32. A cosine differs by up to 0.006.
    """
    periods = state.get("rope_embed.periods")
    if periods is None or getattr(model.position, "periods", "") == "bfloat16":
        return
    if torch.equal(periods.float(), periods.bfloat16().float()):
        warnings.warn(
            "the file's rotary periods are rounded to bfloat16, those of this model are not, as in timm; to use the "
            "file's tables create the model with position='dinov3(periods=\"bfloat16\")'",
            stacklevel=2,
        )


def _match_counts(state: Weights, model: Any, names: set[str]) -> str:
    """Every layout with the number of the model's names that it yields, the best match first."""
    counts = {}
    for layout, (_, convert) in LAYOUTS.items():
        try:
            counts[layout] = len(names & set(convert(dict(state), model)))
        except (KeyError, RuntimeError, ValueError, AttributeError):  # keys that this layout needs are missing
            counts[layout] = 0
    order = sorted(counts, key=lambda layout: -counts[layout])
    return ", ".join(f"{layout} ({counts[layout]} of {len(names)} names)" for layout in order)


def _prefixes(state: Weights, name: str) -> list[str]:
    """The prefixes of all keys that end with `name`."""
    return [key.removesuffix(name) for key in state if key.endswith(f".{name}")]
