"""Position schemes: functions of coordinates. This package needs torch alone."""

from . import absolute, coords, presets, rotary, scaling
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
    "build",
    "coords",
    "presets",
    "register",
    "rotary",
    "scaling",
    "schemes",
]
