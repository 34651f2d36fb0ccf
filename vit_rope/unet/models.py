"""Add positions to a U-Net, change their spec, remove them: in place, all or none."""

from collections.abc import Sequence
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .attention import SIZE_IS_IN_CONFIG, install, uninstall
from .classes import CONFIG_KEYS, RopeMixin, rope_class, stock_class
from .maps import AttentionKind, Origin, class_name


def add_positions(
    unet: nn.Module,
    spec: str,
    unit: str = "index",
    origin: Origin = 0.0,
    sample_size: int | Sequence[int] | None = None,
    attention: AttentionKind = "softmax",
) -> nn.Module:
    """Give every self-attention of a U-Net the positions named by `spec`, in place.

    Works on diffusers U-Nets, whose class and config then name the positions, and on the `Unet` of
    denoising-diffusion-pytorch. Absolute schemes are added to the normalised input of attention.

    Args:
        unet: the U-Net to change
        spec: a position scheme, such as "axial(base=100)" or "learned + mixed"
        unit: "index" counts the cells of each feature map. "pixel" puts a cell at the centre of the
            pixels of the input that it covers, so that all levels share one coordinate system, as
            they do with the "centered" units of `coords.grid`
        origin: the position, in that unit, that becomes 0
        sample_size: height and width of the training images in pixels, one number for square
            images; only for denoising-diffusion-pytorch, as diffusers has it in its config
        attention: "softmax", or "linear" to make all these attentions linear
            (`attention.attend_linear`), which a U-Net trained with softmax was not trained for

    Returns the U-Net. Raises TypeError for other models, and ValueError if the U-Net has positions
    already, has no self-attention over feature maps, or has an attention that cannot take the
    scheme or is of an unsupported kind; the U-Net is then unchanged.
    """
    if _is_lucidrains(unet):
        from . import lucidrains  # loads denoising-diffusion-pytorch, which is optional

        if attention != "softmax":
            raise ValueError(
                f"the kind of attention of this Unet was chosen when it was created (full_attn); leave out "
                f"attention={attention!r}"
            )
        return lucidrains.add_to_lucidrains(unet, spec, sample_size, unit, origin)
    _check_unet(unet, "add_positions")
    if isinstance(unet, RopeMixin):
        raise ValueError(
            f"the U-Net has positions already, {unet.config['position']!r}; call set_positions for another spec, or "
            f"remove_positions first"
        )
    if sample_size is not None:
        raise ValueError(f"{SIZE_IS_IN_CONFIG}; got sample_size={sample_size!r} in addition")
    install(unet, spec, unit, origin, attention)
    unet.__class__ = rope_class(type(unet))
    return unet


def set_positions(unet: nn.Module, spec: str) -> nn.Module:
    """Switch a U-Net that has positions to another spec with the same parameters, in place.

    What the positions have learned stays: `set_positions(unet, "yarn(mixed, factor=2)")` scales the
    learned frequencies of a U-Net that was trained with "mixed". Unit, origin and kind of attention
    stay too. The config of a diffusers U-Net names the new spec.

    Returns the U-Net. Raises TypeError for other models and ValueError for a U-Net without
    positions and for a spec that does not fit or has other parameters; the U-Net is then unchanged.
    """
    if _is_lucidrains(unet):
        from . import lucidrains  # loads denoising-diffusion-pytorch, which is optional

        return lucidrains.set_in_lucidrains(unet, spec)
    _check_unet(unet, "set_positions")
    if not isinstance(unet, RopeMixin):
        raise ValueError(f"this {class_name(unet)} has no positions to change; call add_positions")
    unet.set_position(spec)
    return unet


def remove_positions(unet: nn.Module) -> nn.Module:
    """Undo `add_positions`, in place: modules, class and config are as before.

    Returns the U-Net. Raises ValueError if the U-Net has no positions.
    """
    if _is_lucidrains(unet):
        from . import lucidrains  # loads denoising-diffusion-pytorch, which is optional

        return lucidrains.remove_from_lucidrains(unet)
    if not isinstance(unet, RopeMixin):
        raise ValueError(f"this {class_name(unet)} has no positions to remove")
    uninstall(unet)
    unet.__class__ = stock_class(type(unet))
    config = {key: value for key, value in unet.config.items() if key not in CONFIG_KEYS}
    unet._internal_dict = type(unet.config)(config)
    return unet


def _check_unet(model: Any, function: str) -> None:
    """Raise TypeError unless this is a U-Net of diffusers."""
    if not isinstance(model, ModelMixin) or not hasattr(model, "down_blocks"):
        name = class_name(model)
        raise TypeError(f"{function} takes a U-Net of diffusers or denoising-diffusion-pytorch, got {name}")


def _is_lucidrains(unet: object) -> bool:
    """Whether a model is from denoising-diffusion-pytorch, found without importing that package."""
    return any(base.__module__.partition(".")[0] == "denoising_diffusion_pytorch" for base in type(unet).__mro__)
