"""Position schemes: functions of coordinates. This package needs torch alone."""

from . import (
    absolute,
    bias,
    comrope,
    controls,
    convolution,
    coords,
    directions,
    disentangled,
    factored,
    flows,
    fourier,
    generators,
    joining,
    learnedbias,
    presets,
    relative,
    rotary,
    scaling,
    variants,
)
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
    "comrope",
    "controls",
    "convolution",
    "coords",
    "directions",
    "disentangled",
    "factored",
    "flows",
    "fourier",
    "generators",
    "joining",
    "learnedbias",
    "presets",
    "register",
    "relative",
    "rotary",
    "scaling",
    "schemes",
    "variants",
]
