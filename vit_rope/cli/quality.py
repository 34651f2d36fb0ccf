"""The command `vit-rope quality`: scores of the images that a trained denoiser generates."""

import json
from collections.abc import Sequence
from pathlib import Path

from ..files import replacing
from ..training.quality import scores
from .errors import one_line_errors
from .parsers import VerbParser


def quality(
    run: str,
    *,
    judge: str,
    weights: Path | None = None,
    n: int = 1000,
    reference: int = 20_000,
    floor: bool = True,
    steps: int = 50,
    scheduler: str = "ddim",
    guidance: float = 1.0,
    seed: int = 0,
    root: str | None = None,
    out: Path | None = None,
) -> None:
    """Score samples of a trained denoiser; prints one score per line.

    Args:
        run: a run of Diffusion: its folder, or one of its checkpoints
        judge: a run of a classifier on the same data, or "inception"
        weights: for --judge inception: weights-inception-2015-12-05-6726825d.pth of torch-fidelity
        n: number of samples, and of real images for the floor
        reference: number of training images that distances are measured from
        floor: score real test images too
        steps: calls of the network for each image
        scheduler: name of the sampler: ddim, ddpm, dpm++, …
        guidance: classifier-free guidance scale; 1 is none
        seed: seed of the first image; each next image adds 1
        root: folder of the data, if it is not the one of the training
        out: a JSON file for the scores
    """
    if out is not None:
        if out.exists():
            raise ValueError(f"{out} exists; give --out another name")
        out.parent.mkdir(parents=True, exist_ok=True)
    found = scores(run, judge, n, steps, scheduler, guidance, seed, root, reference, weights, floor)
    if out is not None:
        with replacing(out) as file:
            file.write((json.dumps(found, indent=2) + "\n").encode())
    for name, value in found.items():
        print(f"{name} {value:.4g}")


def main(args: Sequence[str]) -> None:
    """Run `vit-rope quality`."""
    parser = VerbParser("vit-rope quality", quality)
    # torch raises RuntimeError for devices and memory that are not there
    with one_line_errors(ValueError, OSError, RuntimeError):
        parser.run(args)
