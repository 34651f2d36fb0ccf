"""Bias schemes: logits gain a function of the displacement only."""

from . import fixed, learned, networks, products
