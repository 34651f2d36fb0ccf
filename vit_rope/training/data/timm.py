"""Image sets that timm reads: tar files, Hugging Face, webdataset and TensorFlow datasets."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from timm.data import create_dataset
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms import v2

from ...files import expand_home
from .files import printable
from .folder import FromFiles
from .loader import Loader, worker_init_fn


class TimmData(FromFiles):
    """A set that `timm.data.create_dataset` opens, by timm's names.

    These are hfds/OWNER/NAME, hfids/…, wds/…, tfds/…, and "" for tar files. Without a name, each
    split is the file `root`/SPLIT.tar with a folder for each class. The order of hfds and tar files
    follows from (seed, epoch). The other kinds are streams: they start over when a run is resumed
    within an epoch, and their reader skips what it cannot read. A set that needs to run its own
    code is refused, and so is an archive with names that point outside it.

    Args:
        num_classes: number of classes of the labels
        name: timm's name of the set
        root: the folder that contains the set, or to which it is downloaded
        train_split: the set's own name for its training images
        val_split: its name for the validation images
        test_split: its name for the test images; "" uses `val_split`
        options: those of every set of image files (FromFiles)
    """

    def __init__(
        self,
        num_classes: int,
        name: str = "",
        root: str = "",
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str = "",
        **options: Any,
    ):
        super().__init__(**options)
        self.num_classes, self.set, self.root = num_classes, name, expand_home(root)
        self.splits = {"train": train_split, "val": val_split, "test": test_split or val_split}
        for split in {} if name else self.splits.values():
            if not (path := Path(self.root, f"{split}.tar")).is_file():
                raise ValueError(f"no file {path}: TimmData without a name needs ROOT/SPLIT.tar")

    def source(self, split: str) -> Any:
        """timm's reader of a split, or its stream of images."""
        name = self.splits[split]
        root = self.root if self.set else str(Path(self.root, f"{name}.tar"))
        options = {"is_training": split == "train", "batch_size": self.batch_size}
        try:
            data: Any = create_dataset(self.set, root=root, split=name, input_img_mode="RGB", **options)
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
    """Raise ValueError for an archive with a name that points outside it."""
    for name in names(reader):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(
                f"the archive {printable(reader.root)} contains the name {printable(name)}, which points outside it"
            )


def names(reader: Any) -> Iterator[str]:
    """The names in the tar file that one of timm's readers has opened."""
    for sample in getattr(reader, "samples", ()):
        if hasattr(sample[0], "name"):
            yield sample[0].name
