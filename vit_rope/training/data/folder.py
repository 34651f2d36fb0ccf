"""Images in folders, one folder a class, as ImageNet comes."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from .files import MAX_PIXELS, Files, OnError, readable, shown
from .in_memory import Strength
from .loader import loader


class FromFiles(LightningDataModule):
    """What sets of image files share; a set of your own gives `num_classes` and `source`.

    Args:
        img_size, crop, batch_size, workers, augment, transforms, repeats, mean, std, on_error, max_pixels: as for
            ImageFolder
    """

    in_chans = 3
    num_classes: int

    def __init__(
        self,
        img_size: int,
        crop: float,
        batch_size: int,
        workers: int,
        augment: Strength,
        transforms: list[v2.Transform] | None,
        repeats: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        on_error: OnError,
        max_pixels: int,
    ):
        super().__init__()
        if min(img_size, batch_size, repeats) < 1 or workers < 0 or not 0 < crop <= 1:
            name = type(self).__name__
            raise ValueError(f"{name} wants img_size, batch_size and repeats >= 1, workers >= 0 and 0 < crop <= 1")
        if on_error not in ("stop", "skip"):
            raise ValueError(f"on_error is stop or skip, got {on_error!r}")
        if not 0 < max_pixels <= (Image.MAX_IMAGE_PIXELS or max_pixels):
            raise ValueError(f"max_pixels is above 0 and at most Pillow's {Image.MAX_IMAGE_PIXELS}, got {max_pixels}")
        if not (len(mean) == len(std) == 3 and all(map(math.isfinite, (*mean, *std))) and min(std) > 0):
            raise ValueError(f"mean and std are 3 numbers each, std above 0, got {tuple(mean)} and {tuple(std)}")
        self.img_size, self.batch_size, self.workers = img_size, batch_size, workers
        self.repeats, self.mean, self.std = repeats, mean, std
        self.on_error: OnError = on_error
        self.max_pixels = max_pixels
        finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
        cubic = v2.InterpolationMode.BICUBIC
        plain = [v2.Resize(round(img_size / crop), cubic), v2.CenterCrop(img_size)]
        light = [v2.RandomResizedCrop(img_size, interpolation=cubic), v2.RandomHorizontalFlip()]
        one_of = [v2.RandomGrayscale(1.0), v2.RandomSolarize(128, 1.0), v2.GaussianBlur(9, (0.1, 2.0))]
        strong = [*light, v2.RandomChoice(one_of), v2.ColorJitter(0.3, 0.3, 0.3)]
        steps = {"none": plain, "light": light, "strong": strong}
        if augment not in steps:
            raise ValueError(f"augment is none, light or strong, got {augment!r}")
        self.train_transform = v2.Compose([*(transforms or steps[augment]), *finish])
        self.eval_transform = v2.Compose([*plain, *finish])

    def source(self, split: str) -> Any:
        """The files of train, val or test: a sequence of (path, class number), or what `Files` takes for one."""
        raise NotImplementedError(f"{type(self).__name__} needs a source()")

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", self.train_transform, self.repeats)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val", self.eval_transform)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test", self.eval_transform)

    def _loader(self, split: str, transform: v2.Transform, repeats: int = 1) -> DataLoader[Any]:
        source, replace = self.source(split), split == "train"  # where all processes want batches, of one size
        files = Files(source, self.num_classes, transform, self.max_pixels, self.on_error, replace)
        return loader(files, split, self.batch_size, self.workers, self.trainer, repeats, collate_fn=readable)


class ImageFolder(FromFiles):
    """Images in `root`/train/CLASS/ and `root`/val/CLASS/; test is `root`/test/CLASS/, or val where there is none.

    Images come as (B, 3, img_size, img_size), normalised by `mean` and `std`.

    Args:
        root: the folder that holds train/ and val/
        img_size: pixels along a side
        crop: share of the resized image that validation sees; 1 is all of its central square
        batch_size: images a step, in each process
        workers: processes that read images
        augment: none (as in validation), light (a random part, mirrored), strong (light, colours, and one of grey,
            solarised or blurred: the 3-Augment of DeiT III, arXiv:2204.07118)
        transforms: torchvision v2 transforms instead of `augment`, from a PIL image to a PIL image or uint8 tensor
        repeats: how often an epoch brings each of the images it brings (repeated augmentation)
        mean: of pixels in [0, 1], for each channel
        std: of pixels in [0, 1], for each channel
        on_error: what an image that cannot be read does: stop the run, or be left out and counted (skip), where in
            training the next one takes its place
        max_pixels: the most that an image may have, or would have at a shorter side of 256
    """

    def __init__(
        self,
        root: str,
        img_size: int = 224,
        crop: float = 0.875,
        batch_size: int = 128,
        workers: int = 4,
        augment: Strength = "light",
        transforms: list[v2.Transform] | None = None,
        repeats: int = 1,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        on_error: OnError = "stop",
        max_pixels: int = MAX_PIXELS,
    ):
        super().__init__(
            img_size, crop, batch_size, workers, augment, transforms, repeats, mean, std, on_error, max_pixels
        )
        self.root = Path(root)
        self.folders = {"train": self.root / "train", "val": self.root / "val"}
        self.folders["test"] = self.root / "test" if (self.root / "test").is_dir() else self.folders["val"]
        self.classes = class_names(self.folders)
        self.num_classes = len(self.classes)

    def source(self, split: str) -> list[tuple[Path, int]]:
        folder = self.folders[split]
        return [(path, label) for label, name in enumerate(self.classes) for path in image_files(folder / name)]


def class_names(folders: dict[str, Path]) -> list[str]:
    """The class folders of train, sorted; ValueError where another split has other ones, or where one is empty."""
    found = {}
    for split, folder in folders.items():
        if not folder.is_dir():
            raise ValueError(f"no folder {folder}: ImageFolder wants ROOT/train/CLASS/ and ROOT/val/CLASS/")
        found[split] = {child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")}
    if not found["train"]:
        raise ValueError(f"{folders['train']} has no class folders")
    for split, names in found.items():
        for name in sorted(found["train"] ^ names):
            here, there = (split, "train") if name in names else ("train", split)
            raise ValueError(f"the class folder {name!r} is in {folders[here]} but missing in {folders[there]}")
        for name in sorted(names):
            if next(image_files(folders[split] / name), None) is None:
                raise ValueError(f"the class folder {folders[split] / name} has no images")
    return sorted(found["train"])


def image_files(folder: Path) -> Iterator[Path]:
    """Paths of the images in a folder and those below, in order of their names; ValueError where one is closed."""

    def stop(error: OSError) -> None:
        raise ValueError(f"cannot look into the folder {shown(error.filename)}: {error.strerror}") from error

    found = [Path(root, name) for root, _, names in os.walk(folder, onerror=stop) for name in names]
    return (path for path in sorted(found) if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())
