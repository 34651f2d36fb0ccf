"""What every training here shares: an optimizer under a schedule, a watch over the numbers, shards of large models."""

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from ..files import check_fit, naming_os_errors
from .data.loader import ResumableSampler
from .optim import OptimConfig, ScheduleConfig, make_optimizer, make_schedule

log = logging.getLogger(__name__)
NonFinite = Literal["stop", "skip", "ignore"]


class Learner(LightningModule):
    """A module that says what the loss of a batch is, and learns: logs `train/loss`, `train/lr`, `train/grad_norm`.

    A subclass gives `model`, which is trained, and `loss`. Where the loss of a batch is not finite in any process, the
    run stops, or all processes leave the batch out; either way `nonfinite.jsonl` in the run's folder keeps the step and
    the indices of the images.
    """

    model: Any

    def __init__(self, name: str, optim: OptimConfig, schedule: ScheduleConfig, nonfinite: NonFinite = "stop"):
        super().__init__()
        if nonfinite not in ("stop", "skip", "ignore"):
            raise ValueError(f"nonfinite is stop, skip or ignore, got {nonfinite!r}")
        self.name, self.optim, self.schedule, self.nonfinite = name, optim, schedule, nonfinite

    def loss(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch, a number to go down."""
        raise NotImplementedError(f"{type(self).__name__} needs a loss()")

    def learning(self) -> nn.Module:
        """What the optimizer moves, and whose `no_weight_decay` it asks."""
        return self.model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        loss = self.loss(batch, batch_idx)
        if self.nonfinite != "ignore" and not self._finite(loss):
            self._keep(float(loss.detach()), batch_idx)
            return None
        rate = max(group["lr"] for optimizer in self.trainer.optimizers for group in optimizer.param_groups)
        self.log_dict({"train/loss": loss, "train/lr": rate})
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        trainer: Any = self.trainer
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            norm = get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
            self.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def on_train_epoch_end(self) -> None:
        dataset = getattr(self.trainer.train_dataloader, "dataset", None)
        skipped = getattr(getattr(dataset, "dataset", dataset), "skipped", None)
        if skipped is not None:
            self.log("train/skipped", float(skipped), sync_dist=True, reduce_fx="sum")

    def configure_model(self) -> None:
        """Split the parameters over the processes of a ModelParallelStrategy, each block by itself (FSDP2)."""
        mesh = self.device_mesh
        if mesh is None or isinstance(next(self.parameters()), DTensor):
            return
        if mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                "models are sharded over data-parallel processes alone: give ModelParallelStrategy data_parallel_size: "
                f"{mesh.size()} and tensor_parallel_size: 1"
            )
        for block in blocks(self.model):
            fully_shard(block, mesh=mesh["data_parallel"])
        # the rest too gives way after a forward, so that parameters are shards whenever callbacks look at them
        fully_shard(self.model, mesh=mesh["data_parallel"], reshard_after_forward=True)

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.learning(), self.optim)
        schedule = make_schedule(optimizer, self.schedule, self.trainer.estimated_stepping_batches, self.optim.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        if strict:
            check_fit(self, state_dict, self.name)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _finite(self, loss: Tensor) -> bool:
        finite = bool(torch.isfinite(loss))
        several = self.trainer.world_size > 1  # then all go the same way, for the others wait for one's gradients
        return self.trainer.strategy.reduce_boolean_decision(finite) if several else finite

    def _keep(self, value: float, batch_idx: int) -> None:
        """Write down which batch it was, and stop if that is asked for."""
        trainer: Any = self.trainer
        loader: Any = trainer.train_dataloader
        sampler, size = getattr(loader, "sampler", None), getattr(loader, "batch_size", 0)
        indices = (
            sampler.indices()[batch_idx * size : (batch_idx + 1) * size]
            if isinstance(sampler, ResumableSampler)
            else []
        )
        callback = trainer.checkpoint_callback
        path = Path(getattr(callback, "dirpath", None) or "checkpoints").parent / "nonfinite.jsonl"
        place = (
            f"step {trainer.global_step} (epoch {trainer.current_epoch}, batch {batch_idx}, rank {self.global_rank})"
        )
        if callback is not None and not trainer.fast_dev_run and not math.isfinite(value):
            row = {"step": trainer.global_step, "epoch": trainer.current_epoch, "batch": batch_idx}
            row |= {"rank": self.global_rank, "loss": str(value), "indices": [int(index) for index in indices]}
            with naming_os_errors(path), path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if self.nonfinite == "stop":
            raise ValueError(
                f"the loss is {'not finite in another process' if math.isfinite(value) else value} at {place}; {path} "
                "has the indices of the images; go on from the last checkpoint with a lower optim.lr or with "
                "trainer.gradient_clip_val, or leave such batches out with --model.nonfinite skip"
            )
        log.warning("left out a batch: its loss is %s at %s", value, place)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The parts of a model that are computed one after the other: the members of its lists of modules."""
    for child in model.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield from child
