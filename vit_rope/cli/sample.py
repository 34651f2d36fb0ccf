"""The command `vit-rope sample`: images from a trained denoiser, with a progress bar.

Shapes   B images of a batch, C channels (1 or 3), H height, W width.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ..sampling.images import image_grid, to_bytes, to_pil, write_gif, write_png
from ..sampling.io import DTYPES, load
from ..sampling.sampler import Denoiser, SampleConfig, sample_batches
from ..sampling.schedulers import SCHEDULERS, check_scheduler
from .errors import one_line_errors
from .parsers import VerbParser

COLUMNS = (TextColumn("{task.percentage:>3.0f}%"), BarColumn(None), TimeRemainingColumn(), TextColumn("left"))


def sample(
    model: Path,
    config: SampleConfig,
    scaling: str | None = None,
    out: Path = Path("samples.png"),
    gif: Path | None = None,
    png_dir: Path | None = None,
    overwrite: bool = False,
    device: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Generate images with a trained denoiser.

    Args:
        model: folder of a run, one of its checkpoints, or folder of a diffusers pipeline
        config: what to sample
        scaling: modifier of rotary positions for a larger --size: ntk, interpolate, yarn, dynamic
        out: a PNG file with all images side by side
        gif: an animated GIF of the denoising
        png_dir: a folder for one PNG file per image, named by its seed, or numbered with --end-seed
        overwrite: replace files that exist
        device: where the network runs (default: cuda if there is a GPU, else cpu)
        dtype: data type of the network
    """
    check_scheduler(config.scheduler)
    check_files(out, gif, png_dir, overwrite)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    denoiser = load(model, device, DTYPES[dtype], scaling, config.size)
    if (channels := denoiser.model.config.in_channels) not in (1, 3):
        raise ValueError(f"the model makes images of {channels} channels; a picture has 1 or 3")
    first_number = config.seed if config.end_seed is None else 0
    images, frames = draw(denoiser, config, png_dir, first_number, keep_frames=gif is not None)
    columns = len(config.labels or ())
    write_png(image_grid(images, columns), out)
    if gif is not None:
        count = sum(len(frame) for frame in frames) // config.n  # frames of each tile follow those of the tile before
        write_gif([torch.cat(frames[i::count]) for i in range(count)], gif, columns)
    for path in (out, gif, png_dir):
        if path is not None:
            print(path)


def draw(
    denoiser: Denoiser, config: SampleConfig, png_dir: Path | None, first_number: int, keep_frames: bool
) -> tuple[Tensor, list[Tensor]]:
    """The images (n, C, H, W), and the steps of their denoising for a film, if those are kept.

    Each batch is written to `png_dir` at once, in files that are numbered from `first_number`. A
    terminal gets a progress bar.
    """
    console, frames, batches = Console(stderr=True), list[Tensor](), list[Tensor]()
    with Progress(*COLUMNS, console=console, expand=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)

        def callback(progress: float, images: Tensor) -> None:
            bar.update(task, completed=progress)
            if keep_frames:
                frames.append(images)

        for images in sample_batches(denoiser, config, callback):
            if png_dir is not None:
                write_pngs(images, png_dir, first_number + sum(map(len, batches)))
            batches.append(images)
    return torch.cat(batches), frames


def write_pngs(images: Tensor, folder: Path, first_number: int) -> None:
    """Write images (B, C, H, W) as files of one folder, numbered from `first_number`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(to_bytes(images), start=first_number):
        write_png(to_pil(image), folder / f"{number:06}.png")


def check_files(out: Path, gif: Path | None, png_dir: Path | None, overwrite: bool) -> None:
    """Raise a ValueError for files that exist or cannot be written, before anything is sampled."""
    for path in filter(None, (out, gif, png_dir)):
        exists = any(path.iterdir()) if path.is_dir() else path.exists()
        if exists and not overwrite:
            raise ValueError(f"{path} exists; give --overwrite to replace it, or another name")
        for folder in path.parents if path != png_dir else (path, *path.parents):
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"cannot write {path}: {folder} is a file, not a folder; choose another name")
    for option, path, suffix in (("--out", out, ".png"), ("--gif", gif, ".gif")):
        if path and path.suffix.lower() != suffix:
            raise ValueError(f"{option} {path}: the name must end with {suffix}")


def main(args: Sequence[str]) -> None:
    """Run `vit-rope sample`."""
    parser = VerbParser("vit-rope sample", sample, SampleConfig, {"labels": "label"}, n=64)
    parser.epilog = f"schedulers: {', '.join(SCHEDULERS)}"
    try:
        # torch raises RuntimeError for devices and memory that are not there
        with one_line_errors(ValueError, OSError, RuntimeError):
            parser.run(args)
    except KeyboardInterrupt:
        print("stopped; images in --png-dir are complete, no other file was written", file=sys.stderr)
        sys.exit(130)
