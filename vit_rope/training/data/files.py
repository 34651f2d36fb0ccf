"""Single image files of any format as RGB, with a size limit; unreadable ones are named or skipped.

Shapes   C channels, H x W pixels
"""

import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.transforms import v2

from ...files import one_line

OnError = Literal["stop", "skip"]
MAX_PIXELS = 2**26  # 8192 x 8192; Pillow's own limit is slightly higher
TRIES = 50  # this many unreadable files in a row are not an accident
log = logging.getLogger(__name__)


class ImageFiles(Dataset[Any]):
    """Image files as (transformed image (C, H, W), class number); error messages name the file.

    Args:
        source: a sequence of (path, class number), or one of timm's readers, whose items are (open
            file, class number) and which names a file by `filename(index)`
        classes: number of classes; a label must be below it
        transform: torchvision v2 transform from a PIL image to a tensor
        max_pixels: largest number of pixels, see `read_image`
        on_error: "stop" raises for an unreadable file, "skip" counts it in `skipped`
        replace: with "skip", return the next readable image in its place, so that batches keep
            their size; otherwise return None, which `collate_readable` drops from the batch

    Raises ValueError for an unreadable file with `on_error` "stop", for a label outside the
    classes, and if `TRIES` files in a row (or all) cannot be read.
    """

    def __init__(
        self,
        source: Any,
        classes: int,
        transform: v2.Transform,
        max_pixels: int,
        on_error: OnError = "stop",
        replace: bool = False,
    ):
        self.source, self.classes, self.transform = source, classes, transform
        self.max_pixels, self.on_error, self.replace = max_pixels, on_error, replace
        self.counter = multiprocessing.Value("q", 0)  # shared by all workers

    @property
    def skipped(self) -> int:
        """How many files were left out, in all workers."""
        return self.counter.value

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | None:
        tries = min(TRIES, len(self)) if self.replace else 1
        for candidate in range(index, index + tries):  # usually only the first
            file, label = self.source[candidate % len(self)]
            name = file if isinstance(file, Path) else self.source.filename(candidate % len(self))
            if not 0 <= int(label) < self.classes:
                raise ValueError(f"the label of {printable(name)} is {label}, but num_classes is {self.classes}")
            try:
                image = read_image(file, self.max_pixels, name)
            except ValueError as error:
                if self.on_error == "stop":
                    raise
                self._skip(error)
                if self.replace and candidate == index + tries - 1:
                    raise ValueError(f"none of {tries} images in a row could be read; the last one: {error}") from error
            else:
                return self.transform(image), int(label)
        return None

    def _skip(self, error: ValueError) -> None:
        with self.counter.get_lock():
            self.counter.value += 1
        log.warning("skipped: %s", error)


def read_image(source: Any, max_pixels: int, name: Any = None) -> Image.Image:
    """Read an image file, a path or an open file called `name`, as RGB.

    16-bit grey is converted to 8 bits, and transparent areas become white. An image is refused
    by the size in its header, before it is decoded, if it has more than `max_pixels`, or would have
    after its shorter side is resized to 256. ValueError names a file that is refused or unreadable.
    """
    try:
        with Image.open(source) as image:
            width, height = image.size
            pixels = max(width * height, max(width, height) * 256**2 // max(1, min(width, height)))
            if pixels <= max_pixels:
                return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise many kinds of exceptions on a broken file
        raise ValueError(f"cannot read the image {printable(name or source)}: {one_line(error)}") from error
    raise ValueError(
        f"the image {printable(name or source)} is too large: {width} x {height} exceeds max_pixels {max_pixels}"
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any of Pillow's modes to RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float32)
        is_8_bit = image.mode == "F" and values.size > 0 and values.max() <= 255
        image = Image.fromarray((values / (255.0 if is_8_bit else 65535.0) * 255).clip(0, 255).round().astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def collate_readable(samples: list[tuple[Tensor, int] | None]) -> Any:
    """The batch of the samples that are not None, or None if all are."""
    readable = [sample for sample in samples if sample is not None]
    return default_collate(readable) if readable else None


def printable(path: Any) -> str:
    """A path as text that can be printed anywhere, even if its name is not valid UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace") if isinstance(path, (str, Path)) else str(path)
