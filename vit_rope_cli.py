"""The command line, `vit-rope VERB …`. It knows the verbs and loads nothing before one is chosen.

The module is next to the package, not inside it, because importing the package loads torch and
timm, which takes seconds.
"""

import importlib
import os
import sys
from collections.abc import Sequence

VERBS = {  # the description of each verb, and an example
    "fit": "train a model from a YAML file: fit --config configs/digits_vit.yaml",
    "validate": "score a checkpoint on the validation set: validate --ckpt_path RUN",
    "test": "score a checkpoint on the test set: test --ckpt_path RUN",
    "sample": "generate images with a trained denoiser: sample RUN --n 64 --steps 50 --out samples.png",
    "quality": "score samples of a trained denoiser: quality RUN --judge RUN_OF_A_CLASSIFIER",
    "study": "train with several positions and seeds: study CONFIG --position axial mixed --seed 0 1",
    "schemes": "list all position schemes and their properties: schemes --sort relative",
    "bench": "measure speed relative to a reference: bench rotate --out rotate.csv",
    "plot": "draw a figure: plot kernel axial mixed --out kernel.png, or plot study TABLE.csv",
}
EXTRA = ("lightning", "jsonargparse", "docstring_parser", "rich", "diffusers", "matplotlib", "tensorboard", "yaml")


def main(args: Sequence[str] | None = None) -> None:
    """Run one verb with the arguments after it, those of the process by default.

    A verb that does not exist ends the process with status 2, a package that is not installed with
    status 1.
    """
    # By default idle OpenMP threads spin, which is several times slower on cores that other
    # processes share. torch reads this when it is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    verb, *options = (sys.argv[1:] if args is None else args) or ["--help"]
    if verb in ("-h", "--help"):
        print(usage())
    elif verb == "--version":
        print(f"vit-rope {version()}")
    elif verb not in VERBS:
        from difflib import get_close_matches  # here, because --help must not wait for it

        near = get_close_matches(verb, VERBS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"vit-rope: there is no verb {verb!r}{hint}\n\n{usage()}", file=sys.stderr)
        sys.exit(2)
    else:
        run(verb, options)


def run(verb: str, options: Sequence[str]) -> None:
    """Load the file of a verb, `vit_rope/cli/VERB.py`, and call its `main` with the arguments."""
    try:
        importlib.import_module(f"vit_rope.cli.{verb}").main(options)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        sys.exit(f'error: vit-rope {verb} needs {package}, which is not installed: pip install "vit_rope[train]"')


def usage() -> str:
    """The list of verbs."""
    lines = [f"  {name:<10} {text}" for name, text in VERBS.items()]
    end = "vit-rope VERB --help lists the options of a verb, vit-rope --version prints the version"
    return "\n".join(["usage: vit-rope VERB …", "", *lines, "", end])


def version() -> str:
    """The version of the package, which is not imported for it."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "vit_rope", "__init__.py")
    with open(path, encoding="utf-8") as file:
        return next(line.split('"')[1] for line in file if line.startswith("__version__"))


if __name__ == "__main__":
    main()
