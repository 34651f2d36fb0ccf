"""The front door of the command line, `vit-rope VERB …`: it knows the verbs, and loads nothing until one is chosen.

It stands beside the package, for whatever lies in the package loads torch and timm first.
"""

import importlib
import sys
from collections.abc import Sequence

VERBS = {
    "fit": "train a model from a YAML file: fit --config configs/digits_vit.yaml",
    "validate": "score a checkpoint on the validation set: validate --ckpt_path RUN",
    "test": "score a checkpoint on the test set: test --ckpt_path RUN",
    "sample": "draw images from a trained denoiser: sample RUN --n 64 --steps 50 --out samples.png",
    "quality": "score samples of a trained denoiser: quality RUN --judge RUN_OF_A_CLASSIFIER",
    "schemes": "list every position scheme and what it claims: schemes --sort relative",
    "bench": "measure speed as ratios: bench rotate --out rotate.csv",
    "plot": "draw a picture: plot kernel axial mixed --out kernel.png, or plot study TABLE.csv",
}
HOMES = {  # the file of cli/ of each verb
    "fit": "fit",
    "validate": "fit",
    "test": "fit",
    "sample": "sample",
    "quality": "quality",
    "schemes": "schemes",
    "bench": "bench",
    "plot": "plot",
}


def main(args: Sequence[str] | None = None) -> None:
    """Run one verb; exits with status 2 and the list of verbs when there is no such verb."""
    given = sys.argv[1:] if args is None else list(args)
    verb = given[0] if given else "--help"
    if verb in VERBS:
        home = importlib.import_module(f"vit_rope.cli.{HOMES[verb]}")
        home.main(args if HOMES[verb] == "fit" else given[1:])  # which raises at a caller, not at a terminal
        return
    lines = [f"  {name:<10} {text}" for name, text in VERBS.items()]
    text = "\n".join(["usage: vit-rope VERB …", "", *lines, "", "vit-rope VERB --help tells each verb's options"])
    if verb in ("-h", "--help"):
        print(text)
    else:
        print(f"vit-rope: no verb {verb!r}\n\n{text}", file=sys.stderr)
        raise SystemExit(2)
