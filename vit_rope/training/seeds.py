"""TODO training.seeds from ['training.callbacks', 'training.batches']."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng


class Reseed(Callback):
    """Let what is random within a step (dropout, mixup, noise) follow from (seed, epoch, batch, process) alone.

    A run that goes on from a checkpoint then draws what it would have drawn, and no state of a generator is kept. It
    goes on with the batch that would have come next.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seed = torch.initial_seed()

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Hand the loader its state: Lightning has none yet when the schedule makes it count the batches (2.6)."""
        trainer.fit_loop._load_combined_loader_states()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        reseed(self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.manual_seed(self.seed)  # for whoever asks what the seed of this process is


class SeededIndex(int):
    """An index that brings along the seed of what is random about its image."""

    seed: int

    def __new__(cls, index: int, seed: int) -> "SeededIndex":
        pick = super().__new__(cls, index)
        pick.seed = seed
        return pick

    def __reduce__(self) -> tuple[type, tuple[int, int]]:
        return SeededIndex, (int(self), self.seed)


@contextmanager
def seeded(index: int) -> Iterator[None]:
    """Let what the block draws follow from the seed of an index, and nothing outside notice."""
    if isinstance(index, SeededIndex):
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
