"""From images to batches: a resumable loader, with randomness from (seed, epoch, index) only.

The order of an epoch includes a seed for each image, from which its random changes are drawn. The
batches of an epoch are therefore the same whatever was drawn before, for any number of workers, and
from any batch on. No library at hand does this: torchdata's StatefulDataLoader stores the states of
generators and workers, so a run could only resume with the same number of workers, and timm's
RepeatAugSampler cannot start within an epoch.
"""

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader, Dataset, Sampler

from ..seeds import SeededIndex, seeded

# the workers of loaders, and the process that started each (a fork has those of its parent, too)
WORKERS: WeakKeyDictionary[BaseProcess, int] = WeakKeyDictionary()


class ResumableSampler(Sampler[int]):
    """One process's share of the indices of an epoch, shuffled by (seed, epoch) or in file order.

    Set `start` to skip the first indices of this process, in an epoch that is resumed. torch's
    DistributedSampler has neither `start` nor a seed for each index (`SeededIndex`).

    Args:
        length: number of images of the set
        shuffle: shuffled shares have equal lengths (a few indices occur twice), others are disjoint
        rank: this process, below `world`
        world: number of processes
        repeats: how many times an epoch draws each of its images, at unchanged length
            (arXiv:1902.05509)
    """

    def __init__(self, length: int, shuffle: bool, rank: int = 0, world: int = 1, repeats: int = 1):
        self.length, self.shuffle, self.rank, self.world, self.repeats = length, shuffle, rank, world, repeats
        self.seed, self.epoch, self.start = torch.initial_seed(), 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls this before each one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.length / self.world) if self.shuffle else len(range(self.rank, self.length, self.world))

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices()[self.start :])

    def indices(self) -> Sequence[int]:
        """This process's indices in the complete epoch."""
        share = slice(self.rank, None, self.world)
        if not self.shuffle:
            return list(range(self.length)[share])
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.length, generator=generator).repeat_interleave(self.repeats)
        order = torch.cat((order, order[: self.world]))
        seeds = torch.randint(2**62, (len(order),), generator=generator)
        pairs = zip(order[share].tolist(), seeds[share].tolist(), strict=True)
        return [SeededIndex(index, seed) for index, seed in pairs][: len(self)]


class SeededDataset(Dataset[Any]):
    """A dataset whose random changes follow from the seeds of the indices, in any process."""

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
    """A DataLoader that can resume within an epoch: its state is the batches drawn.

    Its workers end with this process. A batch that is None, because none of its images could be
    read, is counted but not passed on; raises ValueError if all batches of an epoch are.
    """

    drawn: tuple[int, int] = (-1, 0)  # epoch, batches
    resumed: tuple[int, int] = (-1, 0)  # epoch, batches
    resumed_size: int | None = None  # images of such a batch in all processes, if that is known

    def __iter__(self) -> Any:
        epoch, skip = max(self.drawn[0] + 1, self.resumed[0]), 0
        if isinstance(self.sampler, ResumableSampler):
            # this body runs at the first batch, when Lightning has called set_epoch
            epoch = self.sampler.epoch
            self.check_resumed(epoch)
            skip = self.resumed[1] if self.resumed[0] == epoch else 0
            self.sampler.start = skip * (self.batch_size or 1)
        elif hasattr(self.dataset, "set_epoch"):  # a stream of timm's
            self.dataset.set_epoch(epoch)
        number, passed = skip, 0
        with registered_workers():
            batches = super().__iter__()
        for number, batch in enumerate(batches, start=skip + 1):
            self.drawn = (epoch, number)
            if batch is not None:
                passed += 1
                yield batch
        if number > skip and not passed:
            raise ValueError(
                f"none of the images of {number - skip} batches could be read; "
                "check that they are images, repair them or remove them from the set"
            )
        self.resumed = (-1, 0)

    def state_dict(self) -> dict[str, int]:
        """The epoch, the batches drawn and their size; Lightning stores it in the checkpoint."""
        return {"epoch": self.drawn[0], "batches": self.drawn[1], "size": self._size()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume after the batches that `state_dict` counted."""
        self.resumed, self.resumed_size = (state["epoch"], state["batches"]), state.get("size")

    def check_resumed(self, epoch: int) -> None:
        """Raise ValueError if the run resumes within this epoch with batches of another size.

        Images would be drawn twice or never. The size counts the images of all processes.
        """
        within = isinstance(self.sampler, ResumableSampler) and self.resumed[0] == epoch and self.resumed[1] > 0
        if within and self.resumed_size not in (None, self._size()):
            raise ValueError(
                f"the checkpoint was saved within an epoch, after {self.resumed[1]} batches of {self.resumed_size} "
                f"images in all processes together, which now are {self._size()}: resume with the same "
                "data.batch_size times number of processes, or from a checkpoint of the end of an epoch"
            )

    def _size(self) -> int:
        """Images of a batch in all processes."""
        return (self.batch_size or 1) * (self.sampler.world if isinstance(self.sampler, ResumableSampler) else 1)


def make_loader(
    images: Any, split: str, batch_size: int, workers: int, trainer: Any, repeats: int = 1, **options: Any
) -> Loader:
    """A loader of this process's share: shuffled full batches for "train", otherwise all in order.

    Raises ValueError if a process has fewer training images than `batch_size`, or no others.
    """
    rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
    train = split == "train"
    sampler = ResumableSampler(len(images), train, rank, world, repeats)
    if train and len(sampler) < batch_size:
        raise ValueError(f"batch_size {batch_size} exceeds the {len(sampler)} training images of each process")
    if len(images) < world:  # in all processes: one without images would not take part, and the others would wait
        raise ValueError(f"the {split} set has {len(images)} images for {world} processes: use fewer processes")
    return Loader(
        dataset=SeededDataset(images),
        batch_size=batch_size,
        sampler=sampler,
        drop_last=train,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=worker_init_fn,
        pin_memory=torch.cuda.is_available(),
        **options,
    )


@contextmanager
def registered_workers() -> Iterator[None]:
    """Register the processes that the block starts, also if it fails, to be ended at exit."""
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        started = [process for process in multiprocessing.active_children() if process not in before]
        if started and os.getpid() not in WORKERS.values():
            Finalize(None, end_workers, exitpriority=100)  # before multiprocessing waits for its processes
        WORKERS.update(dict.fromkeys(started, os.getpid()))


def end_workers() -> None:
    """Kill the workers of this process that are left when it exits.

    multiprocessing itself sends SIGTERM, which they ignore, and then waits for them without limit.
    """
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for killed workers
    own = [process for process, parent in WORKERS.items() if parent == os.getpid()]
    for process in own:
        process.kill()
    for process in own:
        process.join()


def worker_init_fn(worker: int) -> None:
    """Seed a worker as Lightning does, and let it ignore SIGINT and SIGTERM.

    Terminals and schedulers send these signals to workers too. The main process needs a few more
    batches to stop properly, and then ends its workers, at the latest by `end_workers`.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    pl_worker_init_function(worker)
