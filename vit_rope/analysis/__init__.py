"""Numbers about position schemes: what they can tell apart, and whether they keep their claims."""

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
