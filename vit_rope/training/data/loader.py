"""From images to batches: order and random changes that (seed, epoch, place) decide alone, a loader that goes on.

What is random about an image has a seed of its own, drawn with the order of the epoch. So the batches of an epoch are
the same whatever happened before, with any number of workers, and from any batch on.
"""

import math
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader, Dataset, Sampler

from ..seeds import SeededIndex, seeded


class ResumableSampler(Sampler[int]):
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
        return [SeededIndex(index, seed) for index, seed in picks][: len(self)]


class SeededDataset(Dataset[Any]):
    """A dataset whose random changes follow from the seeds that come with the indices, in whatever process."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        with seeded(index):
            return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> Any:
        if not hasattr(self.dataset, "__getitems__"):
            return [self[index] for index in indices]
        with seeded(indices[0]):
            return self.dataset.__getitems__(indices)


class Loader(DataLoader[Any]):
    """A DataLoader that can go on within an epoch: its state says how many batches of which epoch were drawn.

    A batch that is None, for none of its images could be read, is drawn but left out. Raises ValueError where all are.
    """

    drawn: tuple[int, int] = (-1, 0)  # epoch, batches
    resumed: tuple[int, int] = (-1, 0)

    def __iter__(self) -> Any:
        epoch, skip = max(self.drawn[0] + 1, self.resumed[0]), 0
        if isinstance(
            self.sampler, ResumableSampler
        ):  # the generator starts with the first batch, when Lightning has set this
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
    order = ResumableSampler(len(images), train, rank, world, repeats)
    if train and len(order) < batch_size:
        raise ValueError(f"batch_size {batch_size} is more than the {len(order)} training images of each process")
    return Loader(
        dataset=SeededDataset(images),
        batch_size=batch_size,
        sampler=order,
        drop_last=train,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=worker_init_fn,
        pin_memory=torch.cuda.is_available(),
        **options,
    )


def worker_init_fn(number: int) -> None:
    """Draw as Lightning lets a worker draw, and leave it to the process that it works for to end it.

    A terminal sends Ctrl-C, and a scheduler SIGTERM, to workers too; but to stop well takes a few batches more.
    """
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    pl_worker_init_function(number)
