"""Weaning a trained model off its learned table."""

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..positions.absolute.wrappers import Gate


class Fade(Callback):
    """Turn every `gate(…)` of the model from 1 to 0 along half a cosine, while the rest of it learns.

    For fine-tuning a model that `ropeify(…, ape="gate")` made: its new positions take over as the table fades out.
    Raises ValueError for a model without a gate.

    Args:
        start: share of the training steps after which the gate begins to close
        stop: share after which it is closed
    """

    def __init__(self, start: float = 0.0, stop: float = 0.5):
        if not 0 <= start < stop <= 1:
            raise ValueError(f"Fade needs 0 <= start < stop <= 1, got start {start} and stop {stop}")
        self.start, self.stop = start, stop
        self.gates: list[Gate] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.gates = [module for module in pl_module.modules() if isinstance(module, Gate)]
        if not self.gates:
            raise ValueError('Fade closes gates, and this model has none; give it position="… + gate(learned)"')
        for gate in self.gates:
            gate.gate.requires_grad_(False)  # this schedule sets it, not the optimizer

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        done = trainer.global_step / max(1.0, trainer.estimated_stepping_batches - 1)  # the last step is at 1
        share = min(max((done - self.start) / (self.stop - self.start), 0.0), 1.0)
        for gate in self.gates:
            gate.gate.fill_(0.5 + 0.5 * math.cos(math.pi * share))
