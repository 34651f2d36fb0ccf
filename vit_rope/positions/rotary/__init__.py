"""Rotary schemes: queries and keys rotate."""

from . import axial, channels, comrope, coordinates, directions, exact, generators, scaling, variants
