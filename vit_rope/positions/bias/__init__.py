"""Bias schemes: a function of the positions only is added to the logits."""

from . import fixed, learned, networks, products
