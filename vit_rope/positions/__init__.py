"""Position schemes: functions of coordinates. This package needs torch alone."""

from . import absolute, bias, coords, disentangled, factored, learnedbias, presets, relative, rotary, scaling
from .base import Layout, Position, Sum
from .encoding import Encoding
from .rotary import Rotary
from .specs import build, register, schemes

__all__ = [
    "Encoding",
    "Layout",
    "Position",
    "Rotary",
    "Sum",
    "absolute",
    "bias",
    "build",
    "coords",
    "disentangled",
    "factored",
    "learnedbias",
    "presets",
    "register",
    "relative",
    "rotary",
    "scaling",
    "schemes",
]
