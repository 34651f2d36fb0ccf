"""The command line: `vit-rope VERB …`, or `python -m vit_rope VERB …`. Each verb imports only what it needs."""

import sys
from collections.abc import Sequence
from typing import Any

VERBS = {
    "fit": "train a model from a YAML file: fit --config configs/digits_vit.yaml",
    "validate": "score a checkpoint on the validation set: validate --ckpt_path RUN",
    "test": "score a checkpoint on the test set: test --ckpt_path RUN",
    "sample": "draw images from a trained denoiser: sample RUN --n 64 --steps 50 --out samples.png",
    "quality": "score samples of a trained denoiser: quality RUN --judge RUN_OF_A_CLASSIFIER",
    "schemes": "list every position scheme and what it claims: schemes --sort relative",
    "bench": "measure speed as ratios: bench rotation --out rotation.csv",
    "plot": "draw a picture: plot kernel axial mixed --out kernel.png, or plot study TABLE.csv",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run one verb; exits with status 2 and the list of verbs when there is no such verb."""
    args = sys.argv[1:] if args is None else list(args)
    verb = args[0] if args else "--help"
    if verb in ("fit", "validate", "test"):
        from .training.cli import main as train

        train(args)
    elif verb == "sample":
        from .sampling import main as sample

        sample(args[1:])
    elif verb == "quality":
        from .training.quality import main as quality

        quality(args[1:])
    elif verb == "schemes":
        _schemes(args[1:])
    elif verb == "plot":
        _plot(args[1:])
    elif verb == "bench":
        from .bench import main as bench

        bench(args[1:])
    else:
        lines = [f"  {name:<10} {text}" for name, text in VERBS.items()]
        text = "\n".join(["usage: vit-rope VERB …", "", *lines, "", "vit-rope VERB --help tells each verb's options"])
        if verb in ("-h", "--help"):
            print(text)
        else:
            print(f"vit-rope: no verb {verb!r}\n\n{text}", file=sys.stderr)
            raise SystemExit(2)


CLAIMS = ("relative", "reversible", "flash", "learned", "extrapolates")


def _schemes(args: list[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser(
        "vit-rope schemes",
        description="List every position scheme with what it claims on an image. relative: logits depend on "
        "displacements alone; reversible: no two cells of the training grid look the same; flash: attention needs no "
        "mask; learned: training changes it; extrapolates: places beyond the training grid differ too.",
    )
    parser.add_argument("--sort", choices=["scheme", *CLAIMS], default="scheme", help="a column: those that do, first")
    print(scheme_table(parser.parse_args(args).sort))


def scheme_table(sort: str = "scheme") -> str:
    """Every registered scheme with its claims, its description's first line and its options, sorted by a column."""
    import inspect
    import textwrap

    from .positions.specs import _SCHEMES

    rows = []
    for name, factory in sorted(_SCHEMES.items()):
        parameters = list(inspect.signature(factory).parameters.values())[1:]
        options = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
        rows.append((name, _claims(name, parameters), inspect.cleandoc(factory.__doc__ or "").splitlines()[0], options))
    if sort in CLAIMS:
        rows.sort(key=lambda row: not row[1][CLAIMS.index(sort)])
    name_width = max(len(name) for name, *_ in rows)
    head = f"{'scheme':<{name_width}}  " + "  ".join(CLAIMS) + "  what it does (and its options)"
    indent = " " * head.index("what it does")
    lines = [head]
    for name, claims, what, options in rows:
        marks = "  ".join(
            f"{'yes' if claim else '-':<{len(title)}}" for claim, title in zip(claims, CLAIMS, strict=True)
        )
        text = textwrap.wrap(what, 120 - len(indent)) + textwrap.wrap(
            f"({options})" if options else "", 120 - len(indent)
        )
        lines += [f"{name:<{name_width}}  {marks}  {text[0]}", *(indent + line for line in text[1:])]
    return "\n".join(lines)


def _claims(name: str, parameters: list[Any]) -> tuple[bool, ...]:
    """What a scheme claims on an image, or on a signal where it has no form for images; modifiers with axial inside."""
    from .positions import Layout, build

    inside = ", ".join("axial" for p in parameters if p.default is p.empty and p.kind is not p.KEYWORD_ONLY)
    try:
        scheme = build(f"{name}({inside})", Layout(width=48, heads=2, grid=(14, 14), depth=2))
    except ValueError:
        scheme = build(f"{name}({inside})", Layout(width=48, heads=2, grid=(14,), depth=2))
    return scheme.relative, scheme.reversible, scheme.keeps_flash, scheme.learned, scheme.extrapolates


def _plot(args: list[str]) -> None:
    import argparse

    parser = argparse.ArgumentParser("vit-rope plot", description="Draw a picture of position schemes.")
    pictures = parser.add_subparsers(dest="picture", required=True)
    kernel = pictures.add_parser("kernel", help="what a displacement does to a score")
    kernel.add_argument("specs", nargs="+", help='schemes, e.g. axial "mixed(base=10)" flat')
    kernel.add_argument("--grid", nargs=2, type=int, default=(14, 14), metavar=("ROWS", "COLUMNS"))
    study = pictures.add_parser("study", help="what training under each scheme came to")
    study.add_argument("table", help="a CSV file of python -m vit_rope.training.study")
    for picture in (kernel, study):
        picture.add_argument("--out", help=f"the PNG to write (default: {picture.prog.split()[-1]}.png)")
    options = vars(parser.parse_args(args))
    from . import plots

    draw = {"kernel": plots.plot_kernel, "study": plots.plot_study}[options.pop("picture")]
    try:
        print(draw(**{key: value for key, value in options.items() if value is not None}))
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
