"""Image sets wherever timm reads them from: tar files, Hugging Face datasets, webdataset and TensorFlow datasets."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_dataset
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms import v2

from .files import MAX_PIXELS, OnError, shown
from .folder import FromFiles
from .in_memory import Strength
from .loader import Loader, worker_init_fn


class TimmData(FromFiles):
    """What `timm.data.create_dataset` opens, by its names: hfds/OWNER/NAME, hfids/…, wds/…, tfds/…, "" for tar files.

    For name "" each split is the file `root`/SPLIT.tar with a folder for each class. hfds and tar files come in an
    order that (seed, epoch) decides. The others are streams: they begin anew when a run goes on within an epoch, and
    their reader leaves out what it cannot read. A set that wants to run code of its own is refused, and so is an
    archive with names that lead out of it.

    Args:
        num_classes: classes that labels tell apart
        name: timm's name of the set
        root: the folder that holds it, or into which it is downloaded
        train_split: the training images, by the set's own name
        val_split: those of validation
        test_split: those of test; "" takes val_split
        img_size, crop, batch_size, workers, augment, transforms, repeats, mean, std, on_error, max_pixels: as for
            ImageFolder
    """

    def __init__(
        self,
        num_classes: int,
        name: str = "",
        root: str = "",
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str = "",
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
        self.num_classes, self.set, self.root = num_classes, name, root
        self.splits = {"train": train_split, "val": val_split, "test": test_split or val_split}
        for split in {} if name else self.splits.values():
            if not Path(root, f"{split}.tar").is_file():
                raise ValueError(f"no file {Path(root, f'{split}.tar')}: TimmData without a name wants ROOT/SPLIT.tar")

    def source(self, split: str) -> Any:
        """timm's reader of a split, or its stream of images."""
        own = self.splits[split]
        root = self.root if self.set else str(Path(self.root, f"{own}.tar"))
        options = {"is_training": split == "train", "batch_size": self.batch_size}
        try:
            data: Any = create_dataset(self.set, root=root, split=own, input_img_mode="RGB", **options)
        except ImportError as error:
            raise ValueError(f"{self.set} needs a package that is not installed: {error}") from error
        if isinstance(data, IterableDataset):
            return data
        check_names(data.reader)
        return data.reader

    def _loader(self, split: str, transform: v2.Transform, repeats: int = 1) -> DataLoader[Any]:
        source = self.source(split)
        if not isinstance(source, IterableDataset):
            return super()._loader(split, transform, repeats)
        stream: Any = source
        stream.transform = transform
        stream.set_loader_cfg(num_workers=self.workers)
        options: dict[str, Any] = {"drop_last": split == "train", "worker_init_fn": worker_init_fn}
        return Loader(dataset=stream, batch_size=self.batch_size, num_workers=self.workers, **options)


def check_names(reader: Any) -> None:
    """Raise a ValueError for an archive with a name that leads out of it, which no honest one has."""
    for name in names(reader):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"the archive {shown(reader.root)} holds the name {shown(name)}, which leads out of it")


def names(reader: Any) -> Iterator[str]:
    """The names in the tar file of one of timm's readers."""
    for sample in getattr(reader, "samples", ()):
        if hasattr(sample[0], "name"):
            yield sample[0].name
