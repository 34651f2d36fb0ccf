"""TODO cli.quality from ['training.quality']."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import files, sampling
from ..files import replacing
from ..training.quality import WEIGHTS, scores


def main(args: Sequence[str] | None = None) -> None:
    """Run `vit-rope quality`, which prints one score a line."""
    parser = argparse.ArgumentParser("vit-rope quality", description="Score samples of a trained denoiser.")
    parser.add_argument("run", help="a run of Diffusion: its folder, or one of its checkpoints")
    parser.add_argument("--judge", required=True, help='a run of a classifier on the same data, or "inception"')
    parser.add_argument("--weights", type=Path, help=f"of --judge inception: your copy of {WEIGHTS}")
    parser.add_argument("--n", type=int, default=1000, help="samples, and real images for the floor")
    parser.add_argument("--reference", type=int, default=20_000, help="training images to measure distances from")
    parser.add_argument("--floor", action=argparse.BooleanOptionalAction, default=True, help="score real images too")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--scheduler", default="ddim", help=", ".join(sampling.SCHEDULERS))
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", help="the data's folder, where it is another than in training")
    parser.add_argument("--out", type=Path, help="a JSON file for the scores")
    options = vars(parser.parse_args(args))
    out = options.pop("out")
    try:
        if out and out.exists():
            raise ValueError(f"{out} exists; give --out another name")
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
        found = scores(**options)
        if out:
            with replacing(out) as file:
                file.write((json.dumps(found, indent=2) + "\n").encode())
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {files.one_line(error)}")
    for name, value in found.items():
        print(f"{name} {value:.4g}")
