"""Positions in the attention of an existing U-Net: `add_positions(unet, "axial(base=100)")`.

A position scheme is a function of coordinates. Each self-attention over a feature map gets its own
scheme, asks it for an encoding and passes that to the same `attend` as the ViT. Coordinates come
from the feature map; in transformer blocks, which flatten the map before attention, its grid
travels with the tokens. Attention over anything else (text, frames) has no positions and stays as
it is.

A U-Net with positions has its own class and config, so that a saved folder is never loaded without
its positions unnoticed: `RopeUNet2DModel.from_pretrained` loads one, `UNet2DModel.from_pretrained`
warns.
"""

from diffusers.models.modeling_utils import ModelMixin  # pipelines look it up here

from .classes import RopeMixin, RopeUNet2DConditionModel, RopeUNet2DModel, class_named, rope_class
from .models import add_positions, remove_positions, set_positions

__all__ = [
    "ModelMixin",
    "RopeMixin",
    "RopeUNet2DConditionModel",
    "RopeUNet2DModel",
    "add_positions",
    "remove_positions",
    "rope_class",
    "set_positions",
]


def __getattr__(name: str) -> type:
    """A class made on demand, such as RopeUNet3DConditionModel, for pipelines and pickles."""
    return class_named(name, __name__)
