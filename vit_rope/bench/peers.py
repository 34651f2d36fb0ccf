"""How other libraries rotate queries and keys, each with the kind of table that it uses.

The function of a library returns its candidates for a number of heads on a grid of side x side in a
dtype: functions that rotate queries and keys. All but timm's use our axial table.

Shapes   queries, keys (B, H, N, D): B samples, H heads, N = side² tokens, D = HEAD_DIM channels
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..positions import Layout, build

HEAD_DIM = 64
RotateQueriesKeys = Callable[[Tensor, Tensor], Sequence[Tensor]]


def peers(libraries: Sequence[str], heads: int, side: int, dtype: torch.dtype) -> dict[str, RotateQueriesKeys]:
    """All candidates of the libraries.

    Raises ValueError for a library that is unknown here or not installed.
    """
    for name in libraries:
        if name not in installed():
            why = "is not installed" if name in LIBRARIES else "is unknown here"
            raise ValueError(f"{name} {why}; available are {', '.join(installed())}")
    candidates = [LIBRARIES[name](heads, side, dtype) for name in libraries]
    return {key: rotate for each in candidates for key, rotate in each.items()}


def installed() -> list[str]:
    """The libraries that can be measured. RoPE-ViT has no package; its formula is written here."""
    modules = {name: name.replace("-", "_") for name in LIBRARIES} | {"rope-vit": "torch"}
    return [name for name, module in modules.items() if importlib.util.find_spec(module)]


def axial_table(side: int) -> Tensor:
    """The table of cosines and sines (N, D / 2, 2) of our scheme `axial`."""
    layout = Layout(HEAD_DIM, 1, (side, side), 1)
    table = build("axial", layout)(layout.coords(), grid=[side, side]).rotation()
    return cast(Tensor, table)[0, :, 0]


def _axial_angles(side: int) -> Tensor:
    """The angles (N, D) of `axial`, each repeated for both channels of a pair."""
    cos, sin = axial_table(side).unbind(-1)
    return torch.atan2(sin, cos).repeat_interleave(2, -1)


def _both(rotate: Callable[[Tensor], Tensor]) -> RotateQueriesKeys:
    """A rotation of one tensor, applied to queries and to keys."""
    return lambda q, k: (rotate(q), rotate(k))


def _timm_rotations(heads: int, side: int, dtype: torch.dtype) -> dict[str, RotateQueriesKeys]:
    from timm.layers import apply_rot_embed_cat
    from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed

    sizes = [side, side]
    axial = RotaryEmbeddingCat(HEAD_DIM, in_pixels=False, temperature=100.0).get_embed(sizes)
    mixed = RotaryEmbeddingMixed(heads * HEAD_DIM, 1, heads).get_embed(sizes)[0].detach()
    dinov3 = RotaryEmbeddingDinoV3(HEAD_DIM).get_embed(sizes)
    return {
        "timm axial": _both(lambda x: apply_rot_embed_cat(x, axial)),
        "timm mixed": _both(lambda x: apply_rot_embed_cat(x, mixed)),
        "timm dinov3": _both(lambda x: apply_rot_embed_cat(x, dinov3, half=True)),
    }


def _rope_vit_rotations(heads: int, side: int, dtype: torch.dtype) -> dict[str, RotateQueriesKeys]:
    table = torch.view_as_complex(axial_table(side))

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * table).flatten(-2).type_as(x)

    return {"complex product, out of place (as RoPE-ViT)": _both(rotate)}


def _diffusers_rotations(heads: int, side: int, dtype: torch.dtype) -> dict[str, RotateQueriesKeys]:
    from diffusers.models.embeddings import apply_rotary_emb

    table: Any = [t.repeat_interleave(2, -1) for t in axial_table(side).unbind(-1)]
    rotate: Any = apply_rotary_emb
    return {"diffusers": _both(lambda x: rotate(x, table))}


def _transformers_rotations(heads: int, side: int, dtype: torch.dtype) -> dict[str, RotateQueriesKeys]:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    table = [torch.cat((t, t), -1)[None].to(dtype) for t in axial_table(side).unbind(-1)]
    return {"transformers": lambda q, k: apply_rotary_pos_emb(q, k, *table)}


def _rotary_embedding_torch_rotations(heads: int, side: int, dtype: torch.dtype) -> dict[str, RotateQueriesKeys]:
    from rotary_embedding_torch import apply_rotary_emb

    table = _axial_angles(side)
    return {"rotary-embedding-torch": _both(lambda x: apply_rotary_emb(table, x))}


def _x_transformers_rotations(heads: int, side: int, dtype: torch.dtype) -> dict[str, RotateQueriesKeys]:
    from x_transformers.x_transformers import apply_rotary_pos_emb

    table = _axial_angles(side)[None]
    return {"x-transformers": _both(lambda x: apply_rotary_pos_emb(x, table))}


LIBRARIES: dict[str, Callable[[int, int, torch.dtype], dict[str, RotateQueriesKeys]]] = {
    "timm": _timm_rotations,
    "rope-vit": _rope_vit_rotations,
    "diffusers": _diffusers_rotations,
    "transformers": _transformers_rotations,
    "rotary-embedding-torch": _rotary_embedding_torch_rotations,
    "x-transformers": _x_transformers_rotations,
}
