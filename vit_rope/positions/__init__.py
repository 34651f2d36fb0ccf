"""Position schemes: functions of coordinates. This package needs torch alone."""

from . import absolute, controls, coords, directions, generators, presets, rotary, scaling, variants
from .base import Layout, Position, Sum
from .encoding import Encoding
from .rotary import Rotary
from .specs import build, modifiers, register, schemes

__all__ = [
    "Encoding",
    "Layout",
    "Position",
    "Rotary",
    "Sum",
    "absolute",
    "build",
    "controls",
    "coords",
    "directions",
    "generators",
    "modifiers",
    "presets",
    "register",
    "rotary",
    "scaling",
    "schemes",
    "variants",
]
