"""Images from a trained denoiser: `sample(load("runs/digits_ddpm"), n=64)` or `vit-rope sample`."""

from .images import image_grid, to_bytes, to_pil, write_gif, write_png
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
    "image_grid",
    "load",
    "make_scheduler",
    "predicted_x0",
    "sample",
    "sample_batches",
    "save",
    "slerp",
    "tile_size",
    "to_bytes",
    "to_pil",
    "write_gif",
    "write_png",
]
