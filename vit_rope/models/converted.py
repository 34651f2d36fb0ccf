"""A RopeViT with the options that only converted models need: those of timm's class Eva, of its
encoders of language models, and of some VisionTransformers."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast

from timm.layers import AttentionPoolLatent, LayerNorm, Mlp, SwiGLU, SwiGLUPacked, get_act_layer, get_norm_layer
from timm.models import named_apply
from timm.models.vision_transformer import get_init_weights_vit
from torch import nn

from .block import RopeBlock
from .state_dicts import checkpoint_filter_fn as checkpoint_filter_fn  # where timm and fine-tuning look for it
from .vit import RopeViT

MLPS: dict[str, Any] = {"mlp": Mlp, "swiglu": SwiGLU, "swiglu_packed": SwiGLUPacked}
OPTIONS = ("norm_eps", "mlp_layer", "num_kv_heads", "final_norm", "attn_pool_num_heads", "attn_pool_mlp_ratio")
OPTIONS += ("position_shift_grid",)


class ConvertedViT(RopeViT):
    """A RopeViT with more options, as `from_timm` and `ropeify` return it.

    It takes the arguments of RopeViT, and also, named as in timm's other classes:

    Args:
        norm_eps: the epsilon of all norms
        mlp_layer: a class, or one of "mlp", "swiglu", "swiglu_packed", which JSON can store
        num_kv_heads: number of heads of keys and values (arXiv:2305.13245), or one for each layer
        final_norm: "both" normalizes before pooling and after it
        attn_pool_num_heads, attn_pool_mlp_ratio: size of the pool, for global_pool="map"
        position_shift_grid: `position_shift` is in cells of this grid, stretched over each image,
            as timm shifts the coordinates of a reference grid

    Raises ValueError for options that do not fit, before any weight is created.
    """

    def __init__(
        self,
        *args: Any,
        norm_eps: float | None = None,
        mlp_layer: Any = "mlp",
        num_kv_heads: int | Sequence[int] | None = None,
        final_norm: bool | Literal["both"] = True,
        attn_pool_num_heads: int | None = None,
        attn_pool_mlp_ratio: float | None = None,
        position_shift_grid: Sequence[int] | None = None,
        depth: int = 12,
        **kwargs: Any,
    ) -> None:
        if isinstance(mlp_layer, str) and mlp_layer not in MLPS:
            raise ValueError(f"mlp_layer is a class or one of {', '.join(MLPS)}, got {mlp_layer!r}")
        if final_norm not in (True, False, "both"):
            raise ValueError(f"final_norm is True, False or 'both', got {final_norm!r}")
        sized_pool = attn_pool_num_heads is not None or attn_pool_mlp_ratio is not None
        if sized_pool and kwargs.get("global_pool") != "map":
            raise ValueError('attn_pool_num_heads and attn_pool_mlp_ratio need global_pool="map"')
        if num_kv_heads is not None:
            if kwargs.get("attention") == "linear":
                raise ValueError("linear attention has as many heads of keys as of queries; leave num_kv_heads out")
            kwargs["block_fn"] = partial(_block, _each_layer(num_kv_heads, depth))
        if norm_eps is not None:
            kwargs["norm_layer"] = partial(_norm_layer(kwargs), eps=norm_eps)
        if final_norm == "both":
            kwargs["fc_norm"] = True
        mlp = MLPS[mlp_layer] if isinstance(mlp_layer, str) else mlp_layer
        super().__init__(*args, mlp_layer=mlp, final_norm=bool(final_norm), depth=depth, **kwargs)
        self.patch_coords.shift_in_cells_of(position_shift_grid)
        if final_norm == "both":
            self.norm = _norm_layer(kwargs)(self.embed_dim, device=kwargs.get("device"), dtype=kwargs.get("dtype"))
        if sized_pool:
            self.attn_pool = _pool(self.embed_dim, attn_pool_num_heads, attn_pool_mlp_ratio, kwargs)
            named_apply(get_init_weights_vit(self.weight_init_mode, needs_reset=False), self.attn_pool, "attn_pool")


def _each_layer(num_kv_heads: int | Sequence[int], depth: int) -> tuple[int, ...]:
    heads = (num_kv_heads,) * depth if isinstance(num_kv_heads, int) else tuple(num_kv_heads)
    if len(heads) != depth:
        raise ValueError(f"num_kv_heads names {len(heads)} layers of {depth}; give one number, or one for each layer")
    return heads


def _block(num_kv_heads: tuple[int, ...], depth: int = 0, **kwargs: Any) -> RopeBlock:
    return RopeBlock(depth=depth, num_kv_heads=num_kv_heads[depth], **kwargs)


def _norm_layer(options: dict[str, Any]) -> Any:
    return get_norm_layer(options.get("norm_layer")) or LayerNorm


def _pool(width: int, num_heads: int | None, mlp_ratio: float | None, options: dict[str, Any]) -> nn.Module:
    """timm's attention pool with its own size; the other options are those of the model."""
    return AttentionPoolLatent(
        width,
        num_heads=num_heads or options.get("num_heads", 12),
        mlp_ratio=mlp_ratio or options.get("mlp_ratio", 4.0),
        norm_layer=_norm_layer(options),
        act_layer=cast(Any, get_act_layer(options.get("act_layer")) or nn.GELU),
        device=options.get("device"),
        dtype=options.get("dtype"),
    )
