"""Sets of image files: what they all share, and images in one folder per class, as in ImageNet.

Images are (B, 3, img_size, img_size) float32, normalised by `mean` and `std`.
"""

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

from ...files import expand_home
from .files import MAX_PIXELS, ImageFiles, OnError, collate_readable, printable
from .in_memory import Strength
from .loader import make_loader


class FromFiles(LightningDataModule):
    """Base of all sets of image files; a subclass sets `num_classes` and implements `source`.

    Args:
        img_size: height and width in pixels
        crop: share of the resized image's side that validation keeps; 1 keeps its central square
        batch_size: images per step, in each process
        workers: processes that read images
        augment: none (as in validation), light (random crop and flip) or strong (light, color
            jitter, and one of grayscale, solarize or blur: the 3-Augment of DeiT III,
            arXiv:2204.07118)
        transforms: torchvision v2 transforms that replace `augment`; they map a PIL image to a
            PIL image or uint8 tensor
        repeats: how many times an epoch draws each of its images (repeated augmentation,
            arXiv:1902.05509)
        mean: channel means, for pixels in [0, 1]
        std: channel standard deviations, for pixels in [0, 1]
        on_error: stop the run at an unreadable image, or skip and count it; in training the next
            readable image replaces it
        max_pixels: most pixels of an image, also after its shorter side is resized to 256

    Raises ValueError for an option out of range.
    """

    in_chans = 3
    num_classes: int

    def __init__(
        self,
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
        super().__init__()
        if min(img_size, batch_size, repeats) < 1 or workers < 0 or not 0 < crop <= 1:
            raise ValueError(
                f"{type(self).__name__} needs img_size, batch_size and repeats >= 1, workers >= 0 and 0 < crop <= 1, "
                f"got {img_size}, {batch_size}, {repeats}, {workers} and {crop}"
            )
        if on_error not in ("stop", "skip"):
            raise ValueError(f"on_error must be stop or skip, got {on_error!r}")
        limit = Image.MAX_IMAGE_PIXELS or max_pixels
        if not 0 < max_pixels <= limit:
            raise ValueError(f"max_pixels must be at least 1 and at most Pillow's limit of {limit}, got {max_pixels}")
        if not (len(mean) == len(std) == 3 and all(map(math.isfinite, (*mean, *std))) and min(std) > 0):
            raise ValueError(
                f"mean and std must be 3 finite numbers each, std above 0, got {tuple(mean)} and {tuple(std)}"
            )
        self.img_size, self.batch_size, self.workers = img_size, batch_size, workers
        self.repeats, self.mean, self.std = repeats, mean, std
        self.on_error: OnError = on_error
        self.max_pixels = max_pixels
        to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
        center = center_crop(img_size, crop)
        augmented = center if augment == "none" else augmentation(img_size, augment)
        self.train_transform = v2.Compose([*(transforms or augmented), *to_tensor])
        self.eval_transform = v2.Compose([*center, *to_tensor])

    def source(self, split: str) -> Any:
        """The files of "train", "val" or "test", in a form that `ImageFiles` accepts."""
        raise NotImplementedError(f"{type(self).__name__} must implement source()")

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", self.train_transform, self.repeats)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val", self.eval_transform)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test", self.eval_transform)

    def _loader(self, split: str, transform: v2.Transform, repeats: int = 1) -> DataLoader[Any]:
        replace = split == "train"  # where all processes need batches of the same size
        files = ImageFiles(self.source(split), self.num_classes, transform, self.max_pixels, self.on_error, replace)
        options: dict[str, Any] = {"repeats": repeats, "collate_fn": collate_readable}
        return make_loader(files, split, self.batch_size, self.workers, self.trainer, **options)


def center_crop(size: int, share: float) -> list[v2.Transform]:
    """The transforms of validation: resize, then crop the center, `share` of the shorter side."""
    return [v2.Resize(round(size / share), v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)]


def augmentation(size: int, strength: Strength) -> list[v2.Transform]:
    """The transforms of training for `augment` light or strong; ValueError for another word."""
    light: list[v2.Transform] = [
        v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(),
    ]
    if strength == "light":
        return light
    if strength != "strong":
        raise ValueError(f"augment must be none, light or strong, got {strength!r}")
    one_of = [v2.RandomGrayscale(1.0), v2.RandomSolarize(128, 1.0), v2.GaussianBlur(9, (0.1, 2.0))]
    return [*light, v2.RandomChoice(one_of), v2.ColorJitter(0.3, 0.3, 0.3)]


class ImageFolder(FromFiles):
    """Images in `root`/train/CLASS/ and `root`/val/CLASS/.

    Test images are in `root`/test/CLASS/, or those of val if there is no such folder.

    Args:
        root: the folder that contains train/ and val/
        options: those of every set of image files (FromFiles)
    """

    def __init__(self, root: str, **options: Any):
        super().__init__(**options)
        self.root = Path(expand_home(root))
        self.folders = {"train": self.root / "train", "val": self.root / "val"}
        self.folders["test"] = self.root / "test" if (self.root / "test").is_dir() else self.folders["val"]
        self.classes = class_names(self.folders)
        self.num_classes = len(self.classes)

    def source(self, split: str) -> list[tuple[Path, int]]:
        folder = self.folders[split]
        return [(path, label) for label, name in enumerate(self.classes) for path in image_files(folder / name)]


def class_names(folders: dict[str, Path]) -> list[str]:
    """The sorted names of the class folders, given the folder of each split.

    Raises ValueError if the splits have different classes, or if a class has no images.
    """
    names: dict[str, set[str]] = {}
    for split, folder in folders.items():
        if not folder.is_dir():
            raise ValueError(f"no folder {folder}: ImageFolder needs ROOT/train/CLASS/ and ROOT/val/CLASS/")
        names[split] = {child.name for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")}
    if not names["train"]:
        raise ValueError(f"{folders['train']} has no class folders")
    for split in folders:
        for name in sorted(names["train"] ^ names[split]):
            present, absent = (split, "train") if name in names[split] else ("train", split)
            raise ValueError(f"the class folder {name!r} is in {folders[present]} but missing in {folders[absent]}")
        for name in sorted(names[split]):
            if next(image_files(folders[split] / name), None) is None:
                raise ValueError(f"the class folder {folders[split] / name} has no images")
    return sorted(names["train"])


def image_files(folder: Path) -> Iterator[Path]:
    """Sorted paths of all images below a folder; raises ValueError if a folder cannot be opened."""

    def stop(error: OSError) -> None:
        raise ValueError(f"cannot open the folder {printable(error.filename)}: {error.strerror}") from error

    paths = [Path(root, name) for root, _, names in os.walk(folder, onerror=stop) for name in names]
    return (path for path in sorted(paths) if path.suffix.lower() in IMG_EXTENSIONS and path.is_file())
