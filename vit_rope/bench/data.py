"""The time that the training process spends on preparing data, next to that of a training step.

Only CPU time of this process counts: images that a worker decodes and augments cost it only the
time to receive them.
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
from .model import BATCH, training_step

MODEL, SIZE = "vit_rope_small_patch16_224", 224
PHOTO, PHOTOS = (500, 375), 64  # width and height (the mean of ImageNet) and number of files


def bench(rounds: int = 15) -> list[Ratio]:
    """Batches of digits from memory, by one indexing operation against image by image.

    Then batches of photographs from files, against a training step of ViT-S.
    """
    digits = Digits(batch_size=128)
    digits.setup()
    by_image = make_loader(OneByOne(Images(digits.splits["train"], batch=digits.augment)), "train", 128, 0, None)
    batches = {"one image at a time": _next_batch(by_image), "by indexing": _next_batch(digits.train_dataloader())}
    results = ratios("128 digits from memory", batches, rounds, at_least=0.05)
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(1000, (BATCH,))
    model = timm.create_model(MODEL, position="axial", img_size=SIZE)
    runs = {"training step of ViT-S/16": training_step(model, images, labels, torch.float32)}
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder))
        for workers, name in ((0, "decoded and augmented in this process"), (1, "taken over from a worker")):
            photos = ImageFolder(folder, img_size=SIZE, batch_size=BATCH, workers=workers, augment="strong")
            runs[name] = _next_batch(photos.train_dataloader())
        return results + ratios(f"{BATCH} photographs of {PHOTO[0]} x {PHOTO[1]}", runs, rounds)


class OneByOne(Dataset[Any]):
    """A data set in memory, read image by image, as most data sets are."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index]


def write_photographs(folder: Path) -> None:
    """Write JPEG files of smooth shapes and noise, which take as long to decode as photographs."""
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


def _next_batch(batches: Any) -> Callable[[], object]:
    """A function that returns the next batch, and starts the next epoch after the last one."""

    def endless() -> Iterator[Any]:
        while True:
            yield from batches

    stream = endless()
    return lambda: next(stream)
