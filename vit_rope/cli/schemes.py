"""The command `vit-rope schemes`: a table of all position schemes.

It needs no package of the extra `train`.
"""

import argparse
import inspect
import shutil
import textwrap
from collections.abc import Sequence

from ..analysis.catalogue import CLAIMS, claims_of
from ..positions.specs import factory, schemes, signature
from .errors import one_line_errors

DESCRIPTION = """List all position schemes with their properties on images.

relative    attention logits depend on displacements only
reversible  no two cells of the training grid have the same encoding
flash       attention needs no mask, so fast kernels work
learned     training changes the positions
unbounded   coordinates outside the training grid are told apart too
"""


def main(args: Sequence[str]) -> None:
    """Run `vit-rope schemes`."""
    # without jsonargparse, which is in the extra `train`
    parser = argparse.ArgumentParser(
        "vit-rope schemes", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sort", choices=["scheme", *CLAIMS], default="scheme", help="a column: schemes with that property come first"
    )
    options = parser.parse_args(args)
    width = min(120, max(60, shutil.get_terminal_size((120, 24)).columns))
    with one_line_errors():
        print(scheme_table(options.sort, width))


def scheme_table(sort: str = "scheme", width: int = 120) -> str:
    """A table of all registered schemes, in lines of at most `width` characters.

    A row has the properties, the first paragraph of the docstring, and the options. In less than
    100 columns the description stands below the properties.
    """
    rows = []
    for name in schemes():
        parameters = signature(name).parameters.values()
        options = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
        description = " ".join((inspect.getdoc(factory(name)) or "").partition("\n\n")[0].split())
        rows.append((name, claims_of(name), description, options))
    if sort in CLAIMS:
        rows.sort(key=lambda row: not row[1][CLAIMS.index(sort)])
    name_width = max(len(name) for name, *_ in rows)
    wide, gap = width >= 100, " " * (1 + (width >= 70))
    head = gap.join((f"{'scheme':<{name_width}}", *CLAIMS))
    indent = " " * (len(head) + 2 if wide else 4)
    lines = [f"{head}  description (and options)" if wide else head]
    for name, claims, description, options in rows:
        marks = (f"{'yes' if claim else '-':<{len(title)}}" for claim, title in zip(claims, CLAIMS, strict=True))
        first = gap.join((f"{name:<{name_width}}", *marks))
        text = [
            indent + line
            for part in (description, options and f"({options})")
            for line in textwrap.wrap(part, width - len(indent))
        ]
        lines += [first + text[0][len(first) :], *text[1:]] if wide else [first.rstrip(), *text]
    return "\n".join(lines)
