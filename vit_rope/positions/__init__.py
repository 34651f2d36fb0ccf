"""Position schemes: functions of coordinates. This package needs torch alone."""

from . import absolute, coords, rotary
from .base import Encoding, Layout, Position, Sum
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
    "register",
    "rotary",
    "schemes",
]
