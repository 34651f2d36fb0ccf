"""N-dimensional rotary position embeddings for Vision Transformers and diffusion U-Nets.

A position scheme is a function of coordinates. Attention asks it what to do and never asks which
scheme it is. Importing the package registers its models with timm.
"""

import importlib

from .attention import attend
from .convert import from_timm, pretrained, ropeify, set_positions
from .models import registry
from .models.vit import RopeViT
from .positions import build
from .positions.coords import grid

__version__ = "0.1.0"
__all__ = [
    "RopeViT",
    "add_positions",
    "attend",
    "build",
    "from_timm",
    "grid",
    "remove_positions",
    "ropeify",
    "set_positions",
]

del pretrained, registry  # imported only to register models
_LAZY = {"add_positions": "unet", "remove_positions": "unet"}  # need diffusers, so they load on first use


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
