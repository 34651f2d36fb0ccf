"""Seeds that make a run repeatable, also when it is resumed within an epoch.

What is random in a training step is seeded with (seed, epoch, batch, process), and what is random
about an image with a seed that its index carries. So no state of a random generator is saved.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng


class Reseed(Callback):
    """Seed what is random in a step (dropout, mixup, noise) with (seed, epoch, batch, process).

    A run that resumes from a checkpoint then draws the same numbers as a run that was never
    stopped, and no state of a generator is saved. It resumes with the batch that comes next. By
    hand because Lightning's `seed_everything` seeds only the start of a run.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the seed of the run."""
        self.seed = torch.initial_seed()

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Restore the state of the data loader, and check that it can resume within an epoch.

        Lightning 2.6 does not restore it when the schedule counts the batches, which creates the
        loader before its state is known.
        """
        trainer.fit_loop._load_combined_loader_states()
        if (check := getattr(trainer.train_dataloader, "check_resumed", None)) is not None:
            check(trainer.fit_loop.epoch_progress.current.processed)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed this step."""
        reseed(self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the seed of the run again, for code that reads the seed of this process."""
        torch.manual_seed(self.seed)


class SeededIndex(int):
    """An index of an image, with the seed of what is random about that image."""

    seed: int

    def __new__(cls, index: int, seed: int) -> "SeededIndex":
        seeded_index = super().__new__(cls, index)
        seeded_index.seed = seed
        return seeded_index

    def __reduce__(self) -> tuple[type, tuple[int, int]]:
        return SeededIndex, (int(self), self.seed)


@contextmanager
def seeded(index: int) -> Iterator[None]:
    """Seed the block with the seed of a `SeededIndex`; the generators outside are not affected."""
    if isinstance(index, SeededIndex):
        with isolate_rng(include_cuda=False):
            reseed(index.seed)
            yield
    else:
        yield


def reseed(*numbers: int) -> None:
    """Seed the generators of torch, NumPy and Python with these numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - timm's Mixup uses this generator
    random.seed(seed)
