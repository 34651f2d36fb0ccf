"""TODO cli.plot from ['plots']."""

import argparse
from collections.abc import Sequence

from ..plots import plot_kernel, plot_study


def main(args: Sequence[str]) -> None:
    """Run `vit-rope plot`."""
    parser = argparse.ArgumentParser("vit-rope plot", description="Draw a picture of position schemes.")
    pictures = parser.add_subparsers(dest="picture", required=True)
    kernel = pictures.add_parser("kernel", help="what a displacement does to a score")
    kernel.add_argument("specs", nargs="+", help='schemes, e.g. axial "mixed(base=10)" flat')
    kernel.add_argument("--grid", nargs=2, type=int, default=(14, 14), metavar=("ROWS", "COLUMNS"))
    study = pictures.add_parser("study", help="what training under each scheme came to")
    study.add_argument("table", help="a CSV file of vit-rope study")
    for picture in (kernel, study):
        picture.add_argument("--out", help=f"the PNG to write (default: {picture.prog.split()[-1]}.png)")
    options = vars(parser.parse_args(args))
    draw = {"kernel": plot_kernel, "study": plot_study}[options.pop("picture")]
    try:
        print(draw(**{key: value for key, value in options.items() if value is not None}))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
