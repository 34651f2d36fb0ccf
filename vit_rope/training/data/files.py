"""Image files of any kind as RGB, within bounds; what cannot be read is named, or left out and counted."""

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
MAX_PIXELS = 2**26  # of 8192 x 8192; Pillow's own limit is a little above
TRIES = 50  # so many broken files one after the other are no accident
log = logging.getLogger(__name__)


class Files(Dataset[Any]):
    """Image files as (transformed image, class number); a broken file is named.

    `source[index]` gives a path, or an open file, and a class number below `classes`. With `on_error` skip a broken
    file gives the next one that can be read where `replace` is set, so that batches keep their size, or else None,
    which `readable` leaves out of a batch; `skipped` counts them. Raises ValueError for a broken file with `on_error`
    stop, for a label that is no class, and where `TRIES` files, or all, cannot be read one after the other.
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
        self.counter = multiprocessing.Value("q", 0)  # of all workers

    @property
    def skipped(self) -> int:
        return self.counter.value

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | None:
        tries = min(TRIES, len(self)) if self.replace else 1
        for near in range(index, index + tries):  # mostly one
            file, label = self.source[near % len(self)]
            name = file if isinstance(file, Path) else self.source.filename(near % len(self))
            if not 0 <= int(label) < self.classes:
                raise ValueError(f"the label of {shown(name)} is {label}, but num_classes is {self.classes}")
            try:
                image = read_image(file, self.max_pixels, name)
            except ValueError as error:
                if self.on_error == "stop":
                    raise
                self._leave_out(error)
                if self.replace and near == index + tries - 1:
                    raise ValueError(f"none of {tries} images in a row could be read; the last: {error}") from error
            else:
                return self.transform(image), int(label)
        return None

    def _leave_out(self, error: ValueError) -> None:
        with self.counter.get_lock():
            self.counter.value += 1
        log.warning("left out: %s", error)


def read_image(source: Any, max_pixels: int, name: Any = None) -> Image.Image:
    """An image file (a path, or an open file called `name`) as RGB; a ValueError names what cannot be read.

    16-bit grey is brought to 8 bits, and what is transparent shows white. An image is refused by the size in its head,
    before it is unpacked, where it has more than `max_pixels`, or would have at a shorter side of 256.
    """
    try:
        with Image.open(source) as image:
            width, height = image.size
            pixels = max(width * height, max(width, height) * 256**2 // max(1, min(width, height)))
            if pixels <= max_pixels:
                return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise about anything on a broken file
        raise ValueError(f"cannot read the image {shown(name or source)}: {one_line(error)}") from error
    raise ValueError(
        f"the image {shown(name or source)} is too large: {width} x {height}, more than max_pixels {max_pixels} allows"
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow's as RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float32)
        most = 255.0 if values.size and values.max() <= 255 and image.mode == "F" else 65535.0
        image = Image.fromarray((values / most * 255).clip(0, 255).round().astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def readable(samples: list[tuple[Tensor, int] | None]) -> Any:
    """The batch of those samples that could be read, or None where none could."""
    found = [sample for sample in samples if sample is not None]
    return default_collate(found) if found else None


def shown(path: Any) -> str:
    """A path as text that any terminal and file takes, also where its name is no UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace") if isinstance(path, (str, Path)) else str(path)
