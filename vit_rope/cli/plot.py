"""The command `vit-rope plot`: figures of position schemes and of studies."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ..plots import plot_kernel, plot_study
from .errors import one_line_errors
from .parsers import VerbParser


def kernel_figure(specs: list[str], grid: tuple[int, int] = (14, 14), out: str = "kernel.png") -> Path:
    """Draw the kernel K of rotary schemes: the effect of a displacement on an attention score.

    Args:
        specs: schemes, e.g. axial "mixed(base=10)" flat
        grid: rows and columns of the grid of patches
        out: the PNG file to write
    """
    return plot_kernel(specs, out, (grid[0], grid[1]))


def study_figure(table: str, out: str = "study.png") -> Path:
    """Draw the results of a study: curves of the validation loss, and the scores of samples.

    Args:
        table: a CSV file of vit-rope study
        out: the PNG file to write
    """
    return plot_study(table, out)


FIGURES = {"kernel": kernel_figure, "study": study_figure}


def main(args: Sequence[str]) -> None:
    """Run `vit-rope plot`."""
    figure, *options = args or ["--help"]
    if figure not in FIGURES:
        names = "\n".join(f"  {name:<8} {(each.__doc__ or '').splitlines()[0]}" for name, each in FIGURES.items())
        text = f"usage: vit-rope plot FIGURE …\n\n{names}\n\nvit-rope plot FIGURE --help lists the options of a figure"
        if figure in ("-h", "--help"):
            print(text)
            return
        print(f"vit-rope plot: error: there is no figure {figure!r}\n\n{text}", file=sys.stderr)
        sys.exit(2)
    parser = VerbParser(f"vit-rope plot {figure}", FIGURES[figure])
    with one_line_errors(ValueError, OSError, report=parser.fail):
        print(parser.run(options))
