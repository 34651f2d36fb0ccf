"""Images in [-1, 1] as pictures and films that a person can look at."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..files import replacing


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def picture(images: Tensor, columns: int = 0) -> Image.Image:
    """Images (B, C, H, W) in [-1, 1] in a grid, small ones enlarged: of mode L for one channel, RGB for three.

    It is about as wide as high, or a multiple of `columns` across where there are several.
    """
    count, _, height, width = images.shape
    zoom, border = max(1, 64 // max(height, width)), 2
    square = math.sqrt(count * height / width)
    columns = min(count, max(1, round(square / columns)) * columns if columns > 1 else math.ceil(square))
    rows = math.ceil(count / columns)
    cells = to_bytes(images).repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    cells = torch.nn.functional.pad(cells, (0, border, 0, border), value=255)
    blank = cells.new_full((rows * columns - count, *cells.shape[1:]), 255)
    sheet = torch.cat((cells, blank)).unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    return image_of(torch.nn.functional.pad(sheet, (border, 0, border, 0), value=255))


def image_of(pixels: Tensor) -> Image.Image:
    """Bytes (C, H, W) as a picture."""
    array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()
    if array.ndim == 3 and array.shape[2] != 3:
        raise ValueError(f"a picture has 1 or 3 channels, not {array.shape[2]}")
    return Image.fromarray(array)


def write_png(image: Image.Image, path: Path) -> None:
    """A picture as a file that is whole or not there; OSError where the disk refuses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        image.save(file, "PNG")


def write_gif(frames: Sequence[Tensor], path: Path, columns: int = 0) -> None:
    """Up to 25 of the frames (B, C, H, W) in [-1, 1] as a film of some four seconds that rests on the last one."""
    chosen = sorted({round(i * (len(frames) - 1) / 24) for i in range(25)})  # noise compresses badly
    pictures = [picture(frames[i], columns) for i in chosen]
    times = [100] * (len(pictures) - 1) + [1500]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0)
