"""Absolute schemes: vectors that are added to the tokens."""

from . import convolution, learned, recurrent, waves, wrappers
