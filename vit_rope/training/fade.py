"""Fade out the learned position table of a trained model."""

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..positions.absolute.wrappers import Gate


class Fade(Callback):
    """Move every `gate(…)` of the model from 1 to 0 along half a cosine, while it is trained.

    For fine-tuning a model that `ropeify(…, ape="gate")` made: its new positions take over while
    the table fades out. Raises ValueError for a model without a gate.

    Args:
        start: fraction of the training steps after which the gates begin to close
        stop: fraction of the training steps after which they are closed
    """

    def __init__(self, start: float = 0.0, stop: float = 0.5):
        if not 0 <= start < stop <= 1:
            raise ValueError(f"Fade needs 0 <= start < stop <= 1, got start {start} and stop {stop}")
        self.start, self.stop = start, stop
        self.gates: list[Gate] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the gates and take them away from the optimizer."""
        self.gates = [module for module in pl_module.modules() if isinstance(module, Gate)]
        if not self.gates:
            raise ValueError('Fade closes gates, but this model has none; give it position="… + gate(learned)"')
        for gate in self.gates:
            gate.gate.requires_grad_(False)  # set by this schedule

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the gates for this step."""
        done = trainer.global_step / max(1.0, trainer.estimated_stepping_batches - 1)  # the last step is at 1
        closed = min(max((done - self.start) / (self.stop - self.start), 0.0), 1.0)
        for gate in self.gates:
            gate.gate.fill_(0.5 + 0.5 * math.cos(math.pi * closed))
