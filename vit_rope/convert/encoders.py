"""timm's vision encoders of language models, bare or in a classifier, with the interface of Eva.

Qwen3-ViT (arXiv:2511.21631) and DeepSeek-ViT (arXiv:2609.19969) have blocks and rotations like
those of Eva; those of Gemma 4 (arXiv:2607.02770) differ and are not supported.
"""

from types import SimpleNamespace
from typing import Any, cast

from timm.models.deepseek_vit import DeepseekVitClassifier, DeepseekVitEncoder
from timm.models.gemma4_vit import Gemma4VitClassifier, Gemma4VitEncoder
from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder
from torch import nn

CLASSIFIERS = (Qwen3VitClassifier, DeepseekVitClassifier)
ENCODERS = (*CLASSIFIERS, Qwen3VitEncoder, DeepseekVitEncoder, Gemma4VitClassifier, Gemma4VitEncoder)


def as_eva(model: nn.Module) -> Any:
    """The attributes of an encoder that a conversion reads, named as in timm's Eva.

    Raises ValueError for Gemma 4, and for a projector that merges patches before they are pooled.
    """
    if isinstance(model, Gemma4VitClassifier | Gemma4VitEncoder):
        raise ValueError(
            "RopeViT does not support blocks of type Gemma4Block, which normalize values and the outputs of attention "
            'and MLP; for its rotations create a model with position="xy(axial(base=100, pairs=\\"axis\\"))"'
        )
    outer = cast(Any, model)
    inner = outer.encoder if isinstance(model, CLASSIFIERS) else outer
    projector = getattr(inner, "merger", None) or getattr(inner, "aligner", None)
    if projector is not None:
        option = "encoder_pool=''" if isinstance(model, CLASSIFIERS) else "global_pool='avg'"
        raise ValueError(
            f"RopeViT does not support a projector that merges patches ({type(projector).__name__}); "
            f"create the model with {option}"
        )
    none = nn.Identity()
    return SimpleNamespace(
        patch_embed=inner.patch_embed,
        blocks=inner.blocks,
        rope=inner.rope,
        pos_embed=getattr(inner, "pos_embed", None),
        norm_pre=none,
        norm=getattr(inner, "norm", none),
        fc_norm=outer.norm if outer is not inner else none,
        cls_token=None,
        reg_token=None,
        no_embed_class=True,
        attn_pool=None,
        patch_drop=None,
        pos_drop=nn.Dropout(0.0),
        head_drop=getattr(outer, "head_drop", nn.Dropout(0.0)),
        in_chans=outer.in_chans,
        num_classes=outer.num_classes,
        global_pool=outer.global_pool,
        embed_dim=inner.embed_dim,
        dynamic_img_size=False,
    )
