"""Two- and N-dimensional rotary position embeddings for Vision Transformers and diffusion U-Nets.

A position scheme is a function of coordinates. Attention asks it what to do and never asks which scheme it is.
"""

import importlib

from .attention import attend
from .convert import from_timm, ropeify
from .convert import pretrained as _pretrained  # noqa: F401 - registers models with timm, as `models.vit` does
from .models.vit import RopeViT
from .positions import build
from .positions.coords import grid

__version__ = "0.1.0"
__all__ = ["RopeViT", "add_positions", "attend", "build", "from_timm", "grid", "remove_positions", "ropeify"]

_NEED_DIFFUSERS = {"add_positions": "unet", "remove_positions": "unet"}  # loaded when they are first used


def __getattr__(name: str) -> object:
    if name not in _NEED_DIFFUSERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NEED_DIFFUSERS[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
