"""The command `vit-rope test`: score a checkpoint on the test set."""

from collections.abc import Sequence

from . import fit


def main(args: Sequence[str]) -> None:
    """Run `vit-rope test`."""
    fit.main(args, "test")
