"""Images from a trained denoiser: `vit-rope sample runs/digits_ddpm --out digits.png`, or `sample(load(path), 64)`."""

from .command import main
from .denoising import (
    SCHEDULERS,
    Trained,
    between,
    check,
    denoise,
    make_scheduler,
    sample,
    sample_batches,
    tile_size,
    to_image,
)
from .files import DTYPES, describe, load, save
from .pictures import picture, to_bytes, write_gif, write_png

__all__ = [
    "DTYPES",
    "SCHEDULERS",
    "Trained",
    "between",
    "check",
    "denoise",
    "describe",
    "load",
    "main",
    "make_scheduler",
    "picture",
    "sample",
    "sample_batches",
    "save",
    "tile_size",
    "to_bytes",
    "to_image",
    "write_gif",
    "write_png",
]
