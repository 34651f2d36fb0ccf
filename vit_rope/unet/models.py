"""Positions in the attention of a U-Net that you have: `add_positions(unet, "axial(base=100)")`.

A position scheme is a function of coordinates. Each self-attention over a feature map gets a scheme of its own, asks it
for an encoding and hands that to the same `attend` as the ViT's; coordinates come from the map that it is given. In
transformer blocks the map is flattened before attention sees it, so its grid travels beside the tokens. Attention over
anything else (text, frames) has no place and stays as it is.

A U-Net with positions has a class and a config of its own, so that a folder which it was saved to never comes back
without them unnoticed: `RopeUNet2DModel.from_pretrained` loads one, `UNet2DModel.from_pretrained` warns.
"""

from collections.abc import Sequence
from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from .attention import SAMPLE_SIZE, GridTransformer2DModel, PlacedAttention, UnplacedAttention, install
from .classes import KEYS, RopeMixin, rope_class, stock_class
from .maps import Kind, Origin, class_name


def add_positions(
    unet: nn.Module,
    spec: str,
    unit: str = "index",
    origin: Origin = 0.0,
    sample_size: int | Sequence[int] | None = None,
    attention: Kind = "softmax",
) -> nn.Module:
    """Give every self-attention of a U-Net the positions that `spec` names, in place, and return the U-Net.

    Works on diffusers U-Nets, whose class and config then name the positions, and on denoising-diffusion-pytorch's
    `Unet`, which does not know the size that it is trained at: say it as `sample_size`, in pixels. Absolute schemes are
    added to the normalised input of the attention. `unit` "index" counts the cells of each map; "pixel" places a cell
    at the centre of its own pixels of the U-Net's input, so that all levels speak of the same image, as the "centered"
    units of `coords.grid` do. `origin` is the place, in that unit, which becomes 0. `attention` "linear" makes all of
    them linear, as `attention.attend_linear` has it, which is another function than the softmax of a trained U-Net.

    Raises TypeError for another model and ValueError where it has positions already or no self-attention over maps, or
    where an attention cannot take the scheme or is of a kind that has no place; the U-Net is then as it was.
    """
    if _is_lucidrains(unet):
        from . import lucidrains

        if attention != "softmax":
            raise ValueError(f"this Unet has linear attention where it was made so (full_attn); got {attention!r}")
        return lucidrains.add_positions(unet, spec, sample_size, unit, origin)
    if not isinstance(unet, ModelMixin) or not hasattr(unet, "down_blocks"):
        name = class_name(unet)
        raise TypeError(f"add_positions takes a U-Net of diffusers or denoising-diffusion-pytorch, got {name}")
    if isinstance(unet, RopeMixin):
        raise ValueError(f"the U-Net has positions already, {unet.config['position']!r}; call remove_positions first")
    if sample_size is not None:
        raise ValueError(f"{SAMPLE_SIZE}; got sample_size={sample_size!r} beside it")
    install(unet, spec, unit, origin, attention)
    unet.__class__ = rope_class(type(unet))
    return unet


def remove_positions(unet: nn.Module) -> nn.Module:
    """Undo `add_positions`, in place: modules, class and config are as before. Returns the U-Net.

    Raises ValueError where the U-Net has no positions.
    """
    if _is_lucidrains(unet):
        from . import lucidrains

        return lucidrains.remove_positions(unet)
    if not isinstance(unet, RopeMixin):
        raise ValueError(f"this {class_name(unet)} has no positions to remove")
    plain: Any = AttnProcessor2_0()
    for module in unet.modules():
        if isinstance(module, PlacedAttention):
            del module.position, module.layout
            Attention.set_processor(module, plain)
        module.__class__ = _STAND_INS.get(type(module), type(module))
    unet.__class__ = stock_class(type(unet))
    unet._internal_dict = type(unet.config)({key: value for key, value in unet.config.items() if key not in KEYS})
    return unet


_STAND_INS: dict[type[nn.Module], type[nn.Module]] = {
    PlacedAttention: Attention,
    UnplacedAttention: Attention,
    GridTransformer2DModel: Transformer2DModel,
}


def _is_lucidrains(unet: object) -> bool:
    return any(base.__module__.partition(".")[0] == "denoising_diffusion_pytorch" for base in type(unet).__mro__)
