"""From images to batches: order and random changes that (seed, epoch, place) decide alone, a loader that goes on.

What is random about an image has a seed of its own, drawn with the order of the epoch. So the batches of an epoch are
the same whatever happened before, with any number of workers, and from any batch on.
"""

import math
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

Split = tuple[Tensor, Tensor]  # images (N, C, H, W) uint8, labels (N,) int64


class Pick(int):
    """An index that brings along the seed of what is random about its image."""

    seed: int

    def __new__(cls, index: int, seed: int) -> "Pick":
        pick = super().__new__(cls, index)
        pick.seed = seed
        return pick

    def __reduce__(self) -> tuple[type, tuple[int, int]]:
        return Pick, (int(self), self.seed)


class Order(Sampler[int]):
    """One process's share of an epoch's indices, shuffled by (seed, epoch) or in file order.

    Shuffled shares are of equal length (a few indices come twice); others are disjoint. With `repeats`, each image
    of an epoch comes that many times and the epoch keeps its length (arXiv:1902.05509). `start` passes over the first
    indices of this process, for an epoch that was begun already.
    """

    def __init__(self, length: int, shuffle: bool, rank: int = 0, world: int = 1, repeats: int = 1):
        self.length, self.shuffle, self.rank, self.world, self.repeats = length, shuffle, rank, world, repeats
        self.seed, self.epoch, self.start = torch.initial_seed(), 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.length / self.world) if self.shuffle else len(range(self.rank, self.length, self.world))

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices()[self.start :])

    def indices(self) -> Sequence[int]:
        """This process's indices of the whole epoch."""
        if not self.shuffle:
            return list(range(self.rank, self.length, self.world))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.length, generator=generator).repeat_interleave(self.repeats)
        order = torch.cat((order, order[: self.world]))
        seeds = torch.randint(2**62, (len(order),), generator=generator)
        mine = slice(self.rank, None, self.world)
        picks = zip(order[mine].tolist(), seeds[mine].tolist(), strict=True)
        return [Pick(index, seed) for index, seed in picks][: len(self)]


class Seeded(Dataset[Any]):
    """A dataset whose random changes follow from the seeds that come with the indices, in whatever process."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        with drawing(index):
            return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> Any:
        if not hasattr(self.dataset, "__getitems__"):
            return [self[index] for index in indices]
        with drawing(indices[0]):
            return self.dataset.__getitems__(indices)


@contextmanager
def drawing(index: int) -> Iterator[None]:
    """Let what the block draws follow from the seed of an index, and nothing outside notice."""
    if isinstance(index, Pick):
        with isolate_rng(include_cuda=False):
            reseed(index.seed)
            yield
    else:
        yield


def reseed(*numbers: int) -> None:
    """Let what is drawn next, by torch, numpy or Python, follow from these numbers alone."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - which timm's Mixup draws from
    random.seed(seed)


class Augment(nn.Module):
    """Random changes, drawn for each image of a batch (B, C, H, W) in [-1, 1]; what comes in from outside is black.

    Args:
        flip: mirror every second image
        shift: move by up to this share of a side, by whole pixels where nothing turns or scales
        turn: rotate by up to this many degrees
        scale: grow or shrink by up to this share
        contrast: brightness and contrast change by up to this share
        erase: this share of the images loses a rectangle of up to a third of each side
    """

    def __init__(
        self,
        flip: bool = False,
        shift: float = 0.0,
        turn: float = 0.0,
        scale: float = 0.0,
        contrast: float = 0.0,
        erase: float = 0.0,
    ):
        super().__init__()
        self.flip, self.shift, self.turn = flip, shift, turn
        self.scale, self.contrast, self.erase = scale, contrast, erase

    def forward(self, images: Tensor) -> Tensor:
        count, _, height, width = images.shape
        if self.flip or self.shift or self.turn or self.scale:
            side = torch.tensor([width, height])
            move = self._within(count, 2, limit=self.shift) * 2  # affine_grid's sides are 2 long
            if not (self.turn or self.scale):
                move = (move * side / 2).round() * 2 / side
            angle = self._within(count, limit=math.radians(self.turn))
            size = (1 + self._within(count, limit=self.scale)).reciprocal()
            mirror = torch.where(torch.rand(count) < 0.5 * self.flip, -1.0, 1.0)
            cos, sin, aspect = angle.cos() * size, angle.sin() * size, height / width
            rows = (
                torch.stack((cos * mirror, -sin * aspect, move[:, 0]), dim=1),
                torch.stack((sin * mirror / aspect, cos, move[:, 1]), dim=1),
            )
            grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
            images = F.grid_sample(images + 1, grid, align_corners=False) - 1
        if self.contrast:
            gain = 1 + self._within(count, 1, 1, 1, limit=self.contrast)
            images = (images * gain + self._within(count, 1, 1, 1, limit=self.contrast)).clamp(-1, 1)
        if self.erase:
            hole = self._span(count, height)[:, :, None] & self._span(count, width)[:, None, :]
            hole &= torch.rand(count, 1, 1) < self.erase
            images = torch.where(hole[:, None], torch.rand_like(images) * 2 - 1, images)
        return images

    @staticmethod
    def _within(*shape: int, limit: float) -> Tensor:
        return (torch.rand(shape) * 2 - 1) * limit

    @staticmethod
    def _span(count: int, length: int) -> Tensor:
        """Masks (count, length) of one random run each, up to a third of the length."""
        run = torch.rand(count, 1) * length / 3
        start = torch.rand(count, 1) * (length - run)
        cell = torch.arange(length)
        return (cell >= start) & (cell < start + run)


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


class Loader(DataLoader[Any]):
    """A DataLoader that can go on within an epoch: its state says how many batches of which epoch were drawn.

    A batch that is None, for none of its images could be read, is drawn but left out. Raises ValueError where all are.
    """

    drawn: tuple[int, int] = (-1, 0)  # epoch, batches
    resumed: tuple[int, int] = (-1, 0)

    def __iter__(self) -> Any:
        epoch, skip = max(self.drawn[0] + 1, self.resumed[0]), 0
        if isinstance(self.sampler, Order):  # the generator starts with the first batch, when Lightning has set this
            epoch = self.sampler.epoch
            skip = self.resumed[1] if self.resumed[0] == epoch else 0
            self.sampler.start = skip * (self.batch_size or 1)
        elif hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)  # a stream of timm's
        number, given = skip, 0
        for number, batch in enumerate(super().__iter__(), start=skip + 1):
            self.drawn = (epoch, number)
            if batch is not None:
                given += 1
                yield batch
        if number > skip and not given:
            raise ValueError(
                f"none of the images of {number - skip} batches could be read; are these images at all? "
                "Mend them, or take them out of the set"
            )
        self.resumed = (-1, 0)

    def state_dict(self) -> dict[str, int]:
        """Lightning keeps it in a checkpoint, as it does for every loader that has one."""
        return {"epoch": self.drawn[0], "batches": self.drawn[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.resumed = (state["epoch"], state["batches"])


def loader(
    images: Any, split: str, batch_size: int, workers: int, trainer: Any, repeats: int = 1, **options: Any
) -> Loader:
    """A loader of this process's share: shuffled, in whole batches for `train`, else everything in order."""
    rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
    train = split == "train"
    order = Order(len(images), train, rank, world, repeats)
    if train and len(order) < batch_size:
        raise ValueError(f"batch_size {batch_size} is more than the {len(order)} training images of each process")
    return Loader(
        dataset=Seeded(images),
        batch_size=batch_size,
        sampler=order,
        drop_last=train,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=begin_worker,
        pin_memory=torch.cuda.is_available(),
        **options,
    )


def begin_worker(number: int) -> None:
    """Draw as Lightning lets a worker draw, and leave it to the process that it works for to end it.

    A terminal sends Ctrl-C, and a scheduler SIGTERM, to workers too; but to stop well takes a few batches more.
    """
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    pl_worker_init_function(number)


def as_it_is(batch: Any) -> Any:
    """The collation of what is a batch already."""
    return batch
