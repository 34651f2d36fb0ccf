"""How other libraries rotate queries and keys (B, H, N, D), each by the kind of table that it has.

A library gives its candidates for H heads of D channels on a grid of side x side, in a dtype: functions of queries and
keys. `axial` is what all but timm turn by.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..positions import Layout, build

HEAD = 64
Turn = Callable[[Tensor, Tensor], Sequence[Tensor]]


def peers(names: Sequence[str], heads: int, side: int, dtype: torch.dtype) -> dict[str, Turn]:
    """Every candidate of these libraries; ValueError for one that is not known here, or not installed."""
    for name in names:
        if name not in installed():
            why = "is not installed" if name in LIBRARIES else "is not known here"
            raise ValueError(f"{name} {why}; there are {', '.join(installed())}")
    return {key: turn for name in names for key, turn in LIBRARIES[name](heads, side, dtype).items()}


def installed() -> list[str]:
    """The libraries that can be measured; RoPE-ViT is no package, but a form of its own."""
    modules = {name: name.replace("-", "_") for name in LIBRARIES} | {"rope-vit": "torch"}
    return [name for name, module in modules.items() if importlib.util.find_spec(module)]


def axial(side: int) -> Tensor:
    """Cosines and sines (N, D / 2, 2) of our axial."""
    layout = Layout(HEAD, 1, (side, side), 1)
    turn = build("axial", layout)(layout.coords(), grid=[side, side]).q.rotation
    return torch.cat(turn or [])[0, :, 0]


def _angles(side: int) -> Tensor:
    cos, sin = axial(side).unbind(-1)
    return torch.atan2(sin, cos).repeat_interleave(2, -1)


def _each(turn: Callable[[Tensor], Tensor]) -> Turn:
    return lambda q, k: (turn(q), turn(k))


def _timm(heads: int, side: int, dtype: torch.dtype) -> dict[str, Turn]:
    from timm.layers import apply_rot_embed_cat
    from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed

    sizes = [side, side]
    crossed = RotaryEmbeddingCat(HEAD, in_pixels=False, temperature=100.0).get_embed(sizes)
    mixed = RotaryEmbeddingMixed(heads * HEAD, 1, heads).get_embed(sizes)[0].detach()
    dinov3 = RotaryEmbeddingDinoV3(HEAD).get_embed(sizes)
    return {
        "timm axial": _each(lambda x: apply_rot_embed_cat(x, crossed)),
        "timm mixed": _each(lambda x: apply_rot_embed_cat(x, mixed)),
        "timm dinov3": _each(lambda x: apply_rot_embed_cat(x, dinov3, half=True)),
    }


def _rope_vit(heads: int, side: int, dtype: torch.dtype) -> dict[str, Turn]:
    table = torch.view_as_complex(axial(side))

    def turn(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * table).flatten(-2).type_as(x)

    return {"complex product, out of place (as RoPE-ViT)": _each(turn)}


def _diffusers(heads: int, side: int, dtype: torch.dtype) -> dict[str, Turn]:
    from diffusers.models.embeddings import apply_rotary_emb

    table: Any = [t.repeat_interleave(2, -1) for t in axial(side).unbind(-1)]
    turn: Any = apply_rotary_emb
    return {"diffusers": _each(lambda x: turn(x, table))}


def _transformers(heads: int, side: int, dtype: torch.dtype) -> dict[str, Turn]:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    table = [torch.cat((t, t), -1)[None].to(dtype) for t in axial(side).unbind(-1)]
    return {"transformers": lambda q, k: apply_rotary_pos_emb(q, k, *table)}


def _rotary_embedding_torch(heads: int, side: int, dtype: torch.dtype) -> dict[str, Turn]:
    from rotary_embedding_torch import apply_rotary_emb

    table = _angles(side)
    return {"rotary-embedding-torch": _each(lambda x: apply_rotary_emb(table, x))}


def _x_transformers(heads: int, side: int, dtype: torch.dtype) -> dict[str, Turn]:
    from x_transformers.x_transformers import apply_rotary_pos_emb

    table = _angles(side)[None]
    return {"x-transformers": _each(lambda x: apply_rotary_pos_emb(x, table))}


LIBRARIES: dict[str, Callable[[int, int, torch.dtype], dict[str, Turn]]] = {
    "timm": _timm,
    "rope-vit": _rope_vit,
    "diffusers": _diffusers,
    "transformers": _transformers,
    "rotary-embedding-torch": _rotary_embedding_torch,
    "x-transformers": _x_transformers,
}
