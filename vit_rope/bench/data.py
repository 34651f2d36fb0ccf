"""What feeding a model takes the process that trains it, beside the training step itself.

Seconds are those of this process alone: what workers decode and augment meanwhile costs it only the taking over.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..training.data.folder import ImageFolder
from ..training.data.in_memory import Digits, Images
from ..training.data.loader import make_loader
from .measure import Ratio, ratios
from .model import BATCH, training

MODEL, SIZE = "vit_rope_small_patch16_224", 224
PHOTO, PHOTOS = (500, 375), 64  # pixels, as ImageNet's are on average, and how many files


def bench(rounds: int = 15) -> list[Ratio]:
    """A batch of digits from memory, against one image at a time; a batch of photographs, against a step of ViT-S."""
    digits = Digits(batch_size=128)
    digits.setup()
    singly = make_loader(OneByOne(Images(digits.splits["train"], batch=digits.augment)), "train", 128, 0, None)
    batches = {"one image at a time": _next(singly), "by indexing": _next(digits.train_dataloader())}
    found = ratios("128 digits from memory", batches, rounds, at_least=0.05)
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(1000, (BATCH,))
    model = timm.create_model(MODEL, position="axial", img_size=SIZE)
    runs = {"training step of ViT-S/16": training(model, images, labels, torch.float32)}
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder))
        for workers, name in ((0, "decoded and augmented in this process"), (1, "taken over from a worker")):
            photos = ImageFolder(folder, img_size=SIZE, batch_size=BATCH, workers=workers, augment="strong")
            runs[name] = _next(photos.train_dataloader())
        return found + ratios(f"{BATCH} photographs of {PHOTO[0]} x {PHOTO[1]}", runs, rounds)


class OneByOne(Dataset[Any]):
    """The same images as most data sets give them, one by one, to be stacked."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index]


def photographs(folder: Path) -> None:
    """Write JPEG files that take as long to decode as photographs do: smooth shapes under some noise."""
    generator = torch.Generator().manual_seed(0)
    width, height = PHOTO
    for index in range(PHOTOS):
        shapes = torch.rand(1, 3, 6, 8, generator=generator) * 255
        smooth = torch.nn.functional.interpolate(shapes, (height, width), mode="bicubic")[0]
        pixels = (smooth + 8 * torch.randn(smooth.shape, generator=generator)).clamp(0, 255).byte()
        for split in ("train", "val"):
            path = folder / split / "photo" / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path, quality=90)


def _next(batches: Any) -> Callable[[], object]:
    """A run that takes the next batch, epoch after epoch."""

    def forever() -> Iterator[Any]:
        while True:
            yield from batches

    stream = forever()
    return lambda: next(stream)
