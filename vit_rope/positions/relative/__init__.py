"""Relative schemes: the logits gain terms of the displacement and the content of tokens."""

from . import disentangled, tables
