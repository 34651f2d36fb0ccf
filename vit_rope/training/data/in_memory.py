"""Small image sets held in memory as uint8: digits, Fashion-MNIST, CIFAR, two sets for studies.

Every module yields (images, labels), sets `num_classes`, `in_chans` and `img_size`, and shuffles
each epoch by (seed, epoch) only, so a resumed run sees the batches that it would have seen.

Shapes   images (B, C, H, W) float32 in [-1, 1], labels (B,) int64; N images of a split
"""

import gzip
import math
import zlib
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets import FashionMNIST as Download
from torchvision.transforms import v2

from ...files import expand_home
from .augment import Augment
from .loader import make_loader

Split = tuple[Tensor, Tensor]  # images (N, C, H, W) uint8, labels (N,) int64
Strength = Literal["none", "light", "strong"]  # of augmentation


class Images(Dataset[Any]):
    """A split in memory; `__getitems__`, which DataLoader calls, reads a batch by one indexing.

    Args:
        split: images and labels
        each: transforms of single uint8 images (C, H, W)
        batch: a module that changes a batch (B, C, H, W) in [-1, 1], such as `Augment`
    """

    def __init__(self, split: Split, each: Sequence[Callable[[Tensor], Tensor]] = (), batch: nn.Module | None = None):
        (self.images, self.labels), self.each, self.batch = split, each, batch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.__getitems__([index])
        return images[0], int(labels[0])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(indices)
        images = self.images[chosen]
        for transform in self.each:
            images = torch.stack([transform(image) for image in images])
        images = images.float() / 127.5 - 1
        return images if self.batch is None else self.batch(images), self.labels[chosen]


def identity_collate(batch: Any) -> Any:
    """Return the batch unchanged: the dataset has collated it already."""
    return batch


class InMemory(LightningDataModule):
    """Base of these sets; a subclass sets `num_classes`, `in_chans`, `img_size` and has `load`.

    Args:
        batch_size: images per step, in each process
        workers: processes that prepare batches; 0 is fastest for images this small
        augment: none, light (small changes that suit the set) or strong (light, and rotations by up
            to 10 degrees, sizes by 10 %, brightness and contrast by 20 %, 25 % with a hole)
        transforms: torchvision v2 transforms of single training images, (C, H, W) uint8

    Raises ValueError for an option out of range.
    """

    num_classes: int
    in_chans: int
    img_size: int
    light: ClassVar[dict[str, Any]] = {"shift": 0.125}  # options of Augment that do not change the class
    mean, std = 0.5, 0.5  # maps pixels in [0, 1] to the model's [-1, 1]

    def __init__(
        self,
        batch_size: int = 128,
        workers: int = 0,
        augment: Strength = "light",
        transforms: list[v2.Transform] | None = None,
    ):
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}")
        self.batch_size, self.workers, self.transforms = batch_size, workers, transforms or []
        strong = {"shift": 0.08} | self.light | {"rotate": 10.0, "scale": 0.1, "contrast": 0.2, "erase": 0.25}
        options: dict[str, dict[str, Any]] = {"none": {}, "light": self.light, "strong": strong}
        if augment not in options:
            raise ValueError(f"augment must be none, light or strong, got {augment!r}")
        self.augment = Augment(**options[augment])
        self.splits: dict[str, Split] = {}

    def load(self) -> dict[str, Split]:
        """The splits "train", "val" and "test"."""
        raise NotImplementedError(f"{type(self).__name__} must implement load()")

    def setup(self, stage: str | None = None) -> None:
        if not self.splits:
            self.splits = self.load()

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", Images(self.splits["train"], self.transforms, self.augment))

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val", Images(self.splits["val"]))

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test", Images(self.splits["test"]))

    def _loader(self, split: str, images: Images) -> DataLoader[Any]:
        return make_loader(images, split, self.batch_size, self.workers, self.trainer, collate_fn=identity_collate)


class Digits(InMemory):
    """1,797 handwritten digits, 8x8 grey, part of the package.

    Of each class, every 7th image belongs to val and every 7th to test.
    """

    num_classes, in_chans, img_size = 10, 1, 8
    light: ClassVar[dict[str, Any]] = {"shift": 0.06, "rotate": 10.0, "scale": 0.1}

    def load(self) -> dict[str, Split]:
        source = resources.files("vit_rope.training.data").joinpath("digits.npz")
        with source.open("rb") as file, np.load(file) as content:
            images = torch.from_numpy(content["images"]).unsqueeze(1).float().mul(255 / 16).round().byte()
            labels = torch.from_numpy(content["labels"]).long()
        # the 1st, 2nd, 3rd … image of its class, modulo 7
        occurrence = F.one_hot(labels, self.num_classes).cumsum(dim=0).gather(1, labels[:, None])[:, 0] % 7
        masks = {"train": (occurrence != 0) & (occurrence != 3), "val": occurrence == 0, "test": occurrence == 3}
        return {split: (images[mask], labels[mask]) for split, mask in masks.items()}


class FashionMNIST(InMemory):
    """70,000 images of clothes, 28x28 grey.

    Val is the last 5,000 training images, test the official 10,000.

    Args:
        root: a folder with the four IDX files (gzipped or not), or with FashionMNIST/raw/ as
            torchvision stores them; Debian's package dataset-fashion-mnist is found by itself
        download: let torchvision download missing files to `root`
        options: those of every set in memory (InMemory)
    """

    num_classes, in_chans, img_size = 10, 1, 28
    light: ClassVar[dict[str, Any]] = {"flip": True}

    def __init__(self, root: str = "data", download: bool = False, **options: Any):
        super().__init__(**options)
        self.root, self.download = expand_home(root), download

    def prepare_data(self) -> None:
        if self.download:
            Download(self.root, download=True)

    def load(self) -> dict[str, Split]:
        folders = [Path(self.root), Path(self.root, "FashionMNIST", "raw"), Path("/usr/share/datasets/fashion-mnist")]
        train, test = (
            (read_idx(find_idx(folders, f"{part}-images-idx3-ubyte"), 3).unsqueeze(1),
             read_idx(find_idx(folders, f"{part}-labels-idx1-ubyte"), 1).long())
            for part in ("train", "t10k")
        )  # fmt: skip
        for images, labels in (train, test):
            if len(images) != len(labels):
                raise ValueError(f"FashionMNIST has {len(images)} images but {len(labels)} labels")
        return hold_out(train, 5000) | {"test": test}


class CIFAR(InMemory):
    """60,000 photographs, 32x32 RGB, 10 or 100 classes.

    Val is the last 5,000 training images, test the official 10,000.

    Args:
        root: the folder in which torchvision stores them
        classes: 10 or 100
        download: let torchvision download missing files to `root`
        options: those of every set in memory (InMemory)
    """

    in_chans, img_size = 3, 32
    light: ClassVar[dict[str, Any]] = {"flip": True, "shift": 0.125}

    def __init__(self, root: str = "data", classes: Literal[10, 100] = 10, download: bool = False, **options: Any):
        super().__init__(**options)
        self.root, self.num_classes, self.download = expand_home(root), classes, download
        self.source = CIFAR100 if classes == 100 else CIFAR10

    def prepare_data(self) -> None:
        if self.download:
            self.source(self.root, download=True)

    def load(self) -> dict[str, Split]:
        try:
            parts = [self.source(self.root, train=train) for train in (True, False)]
        except RuntimeError as error:
            name = f"CIFAR-{self.num_classes}"
            raise ValueError(f"no {name} in {self.root!r}; give its folder as root, or set download: true") from error
        train, test = (
            (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)) for part in parts
        )
        return hold_out(train, 5000) | {"test": test}


class SmallFashion(FashionMNIST):
    """Fashion-MNIST at 14x14, each pixel the mean of four; the options are the same."""

    img_size: Any = 14

    def load(self) -> dict[str, Split]:
        return {split: (half_size(images), labels) for split, (images, labels) in super().load().items()}


class FashionPairs(SmallFashion):
    """The same garment twice, side by side, at 14x28: a model must match two distant halves."""

    img_size: Any = (14, 28)

    def load(self) -> dict[str, Split]:
        return {split: (images.repeat(1, 1, 1, 2), labels) for split, (images, labels) in super().load().items()}


def hold_out(split: Split, count: int) -> dict[str, Split]:
    """Split off the last `count` images as val, but at most a tenth of all images."""
    images, labels = split
    count = min(count, len(labels) // 10)
    return {"train": (images[:-count], labels[:-count]), "val": (images[-count:], labels[-count:])}


def half_size(images: Tensor) -> Tensor:
    """Images (N, 1, H, W) uint8 as (N, 1, H/2, W/2) uint8."""
    return F.avg_pool2d(images.float(), 2).round().byte()


def find_idx(folders: Sequence[Path], name: str) -> Path:
    """The IDX file of this name, gzipped or not, in the first folder with it; or ValueError."""
    for folder in folders:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    searched = ", ".join(map(str, folders))
    raise ValueError(f"no {name}[.gz] in {searched}; give the folder as root, or set download: true")


def read_idx(path: Path, axes: int) -> Tensor:
    """The content of an IDX file of bytes, gzipped or not, as a uint8 tensor with this many axes.

    Read here because Debian's package holds the files in a layout that torchvision does not open.
    Raises ValueError for a file that is damaged or has another format.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    start = 4 + 4 * axes
    if content[:4] != bytes([0, 0, 8, axes]) or len(content) < start:
        begins = content[:4].hex() or "nothing"
        raise ValueError(f"{path} is not an IDX file of bytes with {axes} axes: it begins with {begins}")
    shape = np.frombuffer(content, ">u4", axes, offset=4).tolist()
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path} must hold {math.prod(shape)} bytes for shape {shape}, got {len(content) - start}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(shape)
