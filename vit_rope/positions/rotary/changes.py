"""A change of frequencies: what a modifier such as `ntk` appends to a rotary scheme.

Shapes   L layers and H heads (1 if shared), A axes, R channel pairs
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Change:
    """One change of a scheme's frequencies; subclasses are pure functions whose fields are their
    options.
    """

    permutes = False  # whether it only reorders rows (axes) and columns (pairs)
    dynamic = False  # whether it depends on the grid
    scale = 1.0  # a factor on the logits

    def __call__(self, freqs: Tensor, grid: Sequence[int] | None) -> Tensor:
        """Frequencies (L, H, A, R) from those before the change, for coordinates on a grid."""
        raise NotImplementedError(f"{type(self).__name__} needs __call__()")
