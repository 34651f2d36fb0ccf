"""Images from a trained denoiser: `vit-rope sample runs/digits_ddpm --out digits.png`, or `sample(load(path), 64)`."""

from .images import picture, to_bytes, write_gif, write_png
from .io import DTYPES, describe, load, save
from .sampler import Denoiser, SampleConfig, check, denoise, sample, sample_batches, slerp, tile_size
from .schedulers import SCHEDULERS, make_scheduler, predicted_x0

__all__ = [
    "DTYPES",
    "SCHEDULERS",
    "Denoiser",
    "SampleConfig",
    "check",
    "denoise",
    "describe",
    "load",
    "make_scheduler",
    "picture",
    "predicted_x0",
    "sample",
    "sample_batches",
    "save",
    "slerp",
    "tile_size",
    "to_bytes",
    "write_gif",
    "write_png",
]
