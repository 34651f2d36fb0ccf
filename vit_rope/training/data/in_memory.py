"""Small image sets that live in memory: kept as bytes, cut into batches by one indexing.

Every module gives (images (B, C, H, W) float32 in [-1, 1], labels (B,) int64), says `num_classes`, `in_chans` and
`img_size`, and draws the order of an epoch from (seed, epoch) alone, so that a resumed run goes on as it would have.
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

from .augment import Augment
from .loader import loader

Split = tuple[Tensor, Tensor]  # images (N, C, H, W) uint8, labels (N,) int64


class Images(Dataset[Any]):
    """A split in memory; `images[indices]` gives a whole batch at once, which DataLoader asks for by `__getitems__`."""

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
    """The collation of what is a batch already."""
    return batch


Strength = Literal["none", "light", "strong"]


class InMemory(LightningDataModule):
    """What the sets below share; a set of your own gives the three facts and `load`.

    Args:
        batch_size: images a step, in each process
        workers: processes that prepare batches; 0 is fastest for images this small
        augment: none, light (what the class names as such) or strong (also turned by 10 degrees, scaled by 10 %,
            brightness and contrast by 20 %, a quarter with a hole)
        transforms: torchvision v2 transforms for the training images, one image (C, H, W) uint8 at a time
    """

    num_classes: int
    in_chans: int
    img_size: int
    light: ClassVar[dict[str, Any]] = {"shift": 0.125}  # options of Augment that leave the class as it was
    mean, std = 0.5, 0.5  # of what the model gets, for pixels in [0, 1]

    def __init__(
        self,
        batch_size: int = 128,
        workers: int = 0,
        augment: Strength = "light",
        transforms: list[v2.Transform] | None = None,
    ):
        super().__init__()
        if batch_size < 1 or workers < 0:
            raise ValueError(f"data want batch_size >= 1 and workers >= 0, got {batch_size} and {workers}")
        self.batch_size, self.workers, self.transforms = batch_size, workers, transforms or []
        strong = {"shift": 0.08} | self.light | {"turn": 10.0, "scale": 0.1, "contrast": 0.2, "erase": 0.25}
        options: dict[str, dict[str, Any]] = {"none": {}, "light": self.light, "strong": strong}
        if augment not in options:
            raise ValueError(f"augment is none, light or strong, got {augment!r}")
        self.augment = Augment(**options[augment])
        self.splits: dict[str, Split] = {}

    def load(self) -> dict[str, Split]:
        """The splits train, val and test."""
        raise NotImplementedError(f"{type(self).__name__} needs a load()")

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
        return loader(images, split, self.batch_size, self.workers, self.trainer, collate_fn=identity_collate)


class Digits(InMemory):
    """1,797 handwritten digits, 8x8 grey, inside the package; of each class every 7th image is val, every 7th test."""

    num_classes, in_chans, img_size = 10, 1, 8
    light: ClassVar[dict[str, Any]] = {"shift": 0.06, "turn": 10.0, "scale": 0.1}

    def load(self) -> dict[str, Split]:
        source = resources.files("vit_rope.training.data").joinpath("digits.npz")
        with source.open("rb") as file, np.load(file) as content:
            images = torch.from_numpy(content["images"]).unsqueeze(1).float().mul(255 / 16).round().byte()
            labels = torch.from_numpy(content["labels"]).long()
        turn = F.one_hot(labels, self.num_classes).cumsum(dim=0).gather(1, labels[:, None])[:, 0] % 7  # the how-manieth
        chosen = {"train": (turn != 0) & (turn != 3), "val": turn == 0, "test": turn == 3}
        return {split: (images[mask], labels[mask]) for split, mask in chosen.items()}


class FashionMNIST(InMemory):
    """70,000 pictures of clothes, 28x28 grey: val is the last 5,000 training images, test the official 10,000.

    Args:
        root: a folder with the four IDX files (gz or not), or with FashionMNIST/raw/ as torchvision leaves it;
            Debian's package dataset-fashion-mnist is found without
        download: let torchvision fetch the files into `root` where they are missing
        batch_size, workers, augment, transforms: as for every set in memory
    """

    num_classes, in_chans, img_size = 10, 1, 28
    light: ClassVar[dict[str, Any]] = {"flip": True}

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        batch_size: int = 128,
        workers: int = 0,
        augment: Strength = "light",
        transforms: list[v2.Transform] | None = None,
    ):
        super().__init__(batch_size, workers, augment, transforms)
        self.root, self.download = root, download

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
    """60,000 photographs, 32x32 RGB, 10 or 100 classes: val is the last 5,000 for training, test the official 10,000.

    Args:
        root: the folder in which torchvision keeps them
        classes: 10 or 100
        download: let torchvision fetch the files into `root` where they are missing
        batch_size, workers, augment, transforms: as for every set in memory
    """

    in_chans, img_size = 3, 32
    light: ClassVar[dict[str, Any]] = {"flip": True, "shift": 0.125}

    def __init__(
        self,
        root: str = "data",
        classes: Literal[10, 100] = 10,
        download: bool = False,
        batch_size: int = 128,
        workers: int = 0,
        augment: Strength = "light",
        transforms: list[v2.Transform] | None = None,
    ):
        super().__init__(batch_size, workers, augment, transforms)
        self.root, self.num_classes, self.download = root, classes, download
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


def hold_out(split: Split, count: int) -> dict[str, Split]:
    """The last `count` images, or a tenth of fewer than ten times as many, become val."""
    images, labels = split
    count = min(count, len(labels) // 10)
    return {"train": (images[:-count], labels[:-count]), "val": (images[-count:], labels[-count:])}


def find_idx(folders: Sequence[Path], name: str) -> Path:
    """The IDX file of this name, gzipped or not, in the first folder that has it."""
    for folder in folders:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    places = ", ".join(map(str, folders))
    raise ValueError(f"no {name}[.gz] in {places}; give the folder as root, or set download: true")


def read_idx(path: Path, axes: int) -> Tensor:
    """The bytes of an IDX file, gzipped or not, as a uint8 tensor of this many axes; ValueError where it is not one."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    start = 4 + 4 * axes
    if content[:4] != bytes([0, 0, 8, axes]) or len(content) < start:
        begins = content[:4].hex() or "nothing"
        raise ValueError(f"{path} is no IDX file of bytes along {axes} axes: it begins with {begins}")
    shape = np.frombuffer(content, ">u4", axes, offset=4).tolist()
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path} should hold {math.prod(shape)} bytes for {shape}, but has {len(content) - start}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(shape)


class SmallFashion(FashionMNIST):
    """Fashion-MNIST at 14x14, each pixel the mean of four; options as there."""

    img_size: Any = 14

    def load(self) -> dict[str, Split]:
        return {split: (shrink(images), labels) for split, (images, labels) in super().load().items()}


class FashionPairs(SmallFashion):
    """The same garment twice, side by side, at 14x28: who looks up the place beside draws both alike."""

    img_size: Any = (14, 28)

    def load(self) -> dict[str, Split]:
        return {split: (images.repeat(1, 1, 1, 2), labels) for split, (images, labels) in super().load().items()}


def shrink(images: Tensor) -> Tensor:
    """Bytes (N, 1, H, W) at half the size."""
    return F.avg_pool2d(images.float(), 2).round().byte()
