"""TODO cli.schemes from ['catalogue']."""

import argparse
import inspect
import os
import sys
import textwrap
from collections.abc import Sequence
from functools import partial

from ..analysis.catalogue import CLAIMS, claims_of
from ..positions.specs import _SCHEMES


def main(args: Sequence[str]) -> None:
    """Run `vit-rope schemes`."""
    parser = argparse.ArgumentParser(
        "vit-rope schemes",
        description="List every position scheme with what it claims on an image. relative: logits depend on "
        "displacements alone; reversible: no two cells of the training grid look the same; flash: attention needs no "
        "mask; learned: training changes it; unbounded: coordinates beyond the training grid are told apart too.",
    )
    parser.add_argument("--sort", choices=["scheme", *CLAIMS], default="scheme", help="a column: those that do, first")
    table = scheme_table(parser.parse_args(args).sort)
    try:
        print(table, flush=True)
    except BrokenPipeError:  # `| head` has seen enough; what is left must not be tried again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def scheme_table(sort: str = "scheme") -> str:
    """Every registered scheme with its claims, its description's first line and its options, sorted by a column."""
    rows = []
    for name, factory in sorted(_SCHEMES.items()):
        parameters = list(inspect.signature(factory).parameters.values())[1:]
        options = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
        rows.append((name, claims_of(name), inspect.cleandoc(factory.__doc__ or "").splitlines()[0], options))
    if sort in CLAIMS:
        rows.sort(key=lambda row: not row[1][CLAIMS.index(sort)])
    name_width = max(len(name) for name, *_ in rows)
    head = f"{'scheme':<{name_width}}  " + "  ".join(CLAIMS) + "  what it does (and its options)"
    indent, lines = " " * head.index("what it does"), [head]
    wrap = partial(textwrap.wrap, width=120 - len(indent))
    for name, claims, what, options in rows:
        marks = (f"{'yes' if claim else '-':<{len(title)}}" for claim, title in zip(claims, CLAIMS, strict=True))
        text = wrap(what) + (wrap(f"({options})") if options else [])
        lines += ["  ".join((f"{name:<{name_width}}", *marks, text[0])), *(indent + line for line in text[1:])]
    return "\n".join(lines)
