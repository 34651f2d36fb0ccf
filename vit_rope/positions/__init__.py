"""Position schemes: functions of coordinates. This package needs torch alone."""

from . import absolute, convolution, coords, flows, fourier, joining, rotary, scaling
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
    "convolution",
    "coords",
    "flows",
    "fourier",
    "joining",
    "register",
    "rotary",
    "scaling",
    "schemes",
]
