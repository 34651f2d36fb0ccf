"""Analysis of position schemes: kernels, decay, aliases, and certificates of their claims.

`numbers` computes properties of schemes, `certify` checks that a scheme is relative or reversible,
`catalogue` lists what all registered schemes claim. Plots of kernels are in `vit_rope.plots`.
"""

from .certify import CertificateError, assert_relative, assert_reversible, relativity_error
from .numbers import (
    Decay,
    Flattening,
    aliases,
    decay,
    decay_bound,
    distinct_bias_rows,
    flattening,
    frequency_rank,
    kernel,
    offsets,
    padding_leak,
    recommended_base,
    reversibility_margin,
)

__all__ = [
    "CertificateError",
    "Decay",
    "Flattening",
    "aliases",
    "assert_relative",
    "assert_reversible",
    "decay",
    "decay_bound",
    "distinct_bias_rows",
    "flattening",
    "frequency_rank",
    "kernel",
    "offsets",
    "padding_leak",
    "recommended_base",
    "relativity_error",
    "reversibility_margin",
]
