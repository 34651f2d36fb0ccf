"""Two- and N-dimensional rotary position embeddings for Vision Transformers and diffusion U-Nets.

A position scheme is a function of coordinates. Attention asks it what to do and never asks which scheme it is.
"""

from . import pretrained  # registers models with timm, as does vit
from .convert import from_timm, ropeify
from .vit import RopeViT

__version__ = "0.1.0"
__all__ = ["RopeViT", "from_timm", "pretrained", "ropeify"]
