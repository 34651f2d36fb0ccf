"""Image tensors as bytes, Pillow images, PNG files and animated GIFs.

Shapes   B images, C channels, H and W height and width in pixels
"""

import math
from collections.abc import Sequence
from pathlib import Path

from einops import rearrange, repeat
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..files import replacing

BORDER = 2  # white pixels between the images of a grid
GIF_FRAMES = 25  # at most, as noise compresses badly


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes, of the same shape."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def image_grid(images: Tensor, columns: int = 0) -> Image.Image:
    """Arrange images (B, C, H, W) in [-1, 1] in a grid, small ones enlarged to about 64 pixels.

    The grid is about as wide as high; where `columns` are more than one, its number of columns is a
    multiple of that. Returns an image of mode L for one channel and RGB for three, and raises
    ValueError for other numbers of channels.
    """
    count, _, height, width = images.shape
    zoom = max(1, 64 // max(height, width))
    square = math.sqrt(count * height / width)
    columns = min(count, max(1, round(square / columns)) * columns if columns > 1 else math.ceil(square))
    rows = math.ceil(count / columns)
    cells = repeat(to_bytes(images), "b c h w -> b c (h zoom1) (w zoom2)", zoom1=zoom, zoom2=zoom)
    cells = F.pad(cells, (0, BORDER, 0, BORDER), value=255)
    cells = F.pad(cells, (0, 0, 0, 0, 0, 0, 0, rows * columns - count), value=255)
    grid = rearrange(cells, "(rows columns) c h w -> c (rows h) (columns w)", rows=rows)
    return to_pil(F.pad(grid, (BORDER, 0, BORDER, 0), value=255))


def to_pil(pixels: Tensor) -> Image.Image:
    """One image of bytes (C, H, W) as a Pillow image; ValueError unless it has 1 or 3 channels."""
    if len(pixels) not in (1, 3):
        raise ValueError(f"an image file has 1 or 3 channels, got {len(pixels)}")
    return Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else rearrange(pixels, "c h w -> h w c").numpy())


def write_png(image: Image.Image, path: Path) -> None:
    """Write an image completely or not at all. Raises OSError if the disk refuses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        image.save(file, "PNG")


def write_gif(frames: Sequence[Tensor], path: Path, columns: int = 0) -> None:
    """Write an animation of about four seconds that pauses on its last frame.

    Each frame (B, C, H, W) in [-1, 1] becomes an `image_grid`; at most 25 of them are used.
    """
    last = GIF_FRAMES - 1
    chosen = sorted({round(i * (len(frames) - 1) / last) for i in range(GIF_FRAMES)})
    grids = [image_grid(frames[i], columns) for i in chosen]
    durations = [100] * (len(grids) - 1) + [1500]  # milliseconds
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        grids[0].save(file, "GIF", save_all=True, append_images=grids[1:], duration=durations, loop=0)
