"""The command `vit-rope sample`: what it takes, a line of progress, and files that are never replaced unasked."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ..files import one_line
from ..sampling.images import image_grid, to_bytes, to_pil, write_gif, write_png
from ..sampling.io import DTYPES, load
from ..sampling.sampler import SampleConfig, sample_batches
from ..sampling.schedulers import SCHEDULERS, check_scheduler


def main(args: Sequence[str] | None = None) -> None:
    """Run `vit-rope sample`; a message that begins with "error:" ends it where something does not fit."""
    options = _parser().parse_args(args)
    try:
        run(options)
    except (
        ValueError,
        OSError,
        RuntimeError,
    ) as error:  # RuntimeError: torch, for devices and memory that are not there
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        print("stopped; images in --png-dir are whole, no other file was written", file=sys.stderr)
        sys.exit(130)


def run(options: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    check_scheduler(options.scheduler)
    _check_free(options)
    denoiser = load(options.model, options.device, DTYPES[options.dtype], options.scaling, options.size)
    if (channels := denoiser.model.config.in_channels) not in (1, 3):
        raise ValueError(f"the model makes images of {channels} channels; a picture has 1 or 3")
    console, frames = Console(stderr=True), list[Tensor]()
    columns = (TextColumn("{task.percentage:>3.0f}%"), BarColumn(None), TimeRemainingColumn(), TextColumn("left"))
    with Progress(*columns, console=console, expand=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)

        def callback(share: float, images: Tensor) -> None:
            bar.update(task, completed=share)
            if options.gif:
                frames.append(images)

        drawn = []
        config = SampleConfig(
            options.n,
            options.steps,
            options.scheduler,
            options.size,
            options.label,
            options.guidance,
            options.seed,
            options.batch,
            options.end_seed,
        )
        for images in sample_batches(denoiser, config, callback):
            if options.png_dir:
                options.png_dir.mkdir(parents=True, exist_ok=True)
                first = options.seed if options.end_seed is None else 0
                for i, image in enumerate(to_bytes(images), start=first + sum(map(len, drawn))):
                    write_png(to_pil(image), options.png_dir / f"{i:06}.png")
            drawn.append(images)
    columns = len(options.label or ())
    write_png(image_grid(torch.cat(drawn), columns), options.out)
    if options.gif:
        count = sum(len(frame) for frame in frames) // options.n  # of every tile, one after the other
        write_gif([torch.cat(frames[i::count]) for i in range(count)], options.gif, columns)
    for path in (options.out, options.gif, options.png_dir):
        if path:
            print(path)


def _check_free(options: argparse.Namespace) -> None:
    for path in (options.out, options.gif, options.png_dir):
        taken = path and (any(path.iterdir()) if path.is_dir() else path.exists())
        if taken and not options.overwrite:
            raise ValueError(f"{path} exists; give --overwrite to replace it, or another name")
        for place in (path, *path.parents) if path else ():
            if place.exists() and not (place.is_dir() or (place == path and path != options.png_dir)):
                raise ValueError(f"cannot write {path}: {place} is a file, not a folder; choose another name")
    for option, path, kind in (("--out", options.out, ".png"), ("--gif", options.gif, ".gif")):
        if path and path.suffix.lower() != kind:
            raise ValueError(f"{option} {path}: the name must end with {kind}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vit-rope sample", description="Draw images from a trained denoiser.")
    add = parser.add_argument
    add("model", type=Path, help="a run's folder, one of its checkpoints, or a diffusers pipeline's folder")
    add("--n", type=int, default=64, help="how many images (default: %(default)s)")
    add("--steps", type=int, default=50, help="calls of the network for each (default: %(default)s)")
    add("--scheduler", default="ddim", metavar="NAME", help=f"{', '.join(SCHEDULERS)} (default: %(default)s)")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="in pixels, also one that was never trained on")
    add(
        "--scaling", metavar="MODIFIER", help="of rotary positions for a larger --size: ntk, interpolate, yarn, dynamic"
    )
    add("--label", type=int, nargs="+", help="classes to draw, in turn; left out, a model with classes draws of any")
    add("--guidance", type=float, default=1.0, help="above 1 exaggerates what the label changes (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the first image, the next one's is one more (default: %(default)s)")
    add(
        "--until",
        type=int,
        dest="end_seed",
        metavar="SEED",
        help="walk from the noise of --seed to that of this one, in --n images",
    )
    add("--batch", type=int, default=64, help="images kept in memory until written to --png-dir (default: %(default)s)")
    add("--out", type=Path, default=Path("samples.png"), help="all images side by side (default: %(default)s)")
    add("--gif", type=Path, help="how they came out of the noise, as a film")
    add("--png-dir", type=Path, help="a folder for single files, named by their seeds, or numbered on a walk")
    add("--overwrite", action="store_true", help="replace files that exist")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="where the network runs (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="what it computes in (default: %(default)s)")
    return parser
