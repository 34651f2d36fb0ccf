"""The command `vit-rope validate`: score a checkpoint on the validation set."""

from collections.abc import Sequence

from . import fit


def main(args: Sequence[str]) -> None:
    """Run `vit-rope validate`."""
    fit.main(args, "validate")
