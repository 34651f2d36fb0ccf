"""Two- and N-dimensional rotary position embeddings for Vision Transformers and diffusion U-Nets.

A position scheme is a function of coordinates. Attention asks it what to do and never asks which scheme it is.
"""

__version__ = "0.1.0"

from . import vit as vit  # registers the timm models
