"""Absolute schemes: the position of a token is added to the token, or joined with it."""

from . import convolution, learned, recurrent, waves, wrappers
