"""State dicts that others publish, with the names and shapes of a RopeViT's.

Each function takes the weights of one layout and gives those of ours: timm's Eva, and what the authors of RoPE-ViT
(arXiv:2403.13298) and DINOv3 (arXiv:2508.10104) publish themselves.
"""

import re

import torch
from torch import Tensor

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


def _prefixes(state: Weights, name: str) -> list[str]:
    """What stands before `name` in the keys that end with it."""
    return [key.removesuffix(name) for key in state if key.endswith(f".{name}")]
