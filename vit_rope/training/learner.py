"""What all training tasks share: optimizer, schedule, a check of the loss, and sharding.

Shapes   B samples
"""

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

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
    """Base class of the training tasks; logs `train/loss`, `train/lr` and `train/grad_norm`.

    A subclass sets `model`, which is trained, and defines `loss`. If the loss of a batch is not
    finite in any process, the run stops or all processes skip the batch. In both cases
    `nonfinite.jsonl` in the run's folder records the step and the indices of the images.

    Args:
        name: name of the model, for error messages
        optim: optimizer, learning rate, weight and layer decay
        schedule: warm-up and course of the learning rate
        nonfinite: for a loss that is nan or infinite: stop the run, skip the batch, or ignore it
    """

    model: Any

    def __init__(self, name: str, optim: OptimConfig, schedule: ScheduleConfig, nonfinite: NonFinite = "stop"):
        super().__init__()
        if nonfinite not in ("stop", "skip", "ignore"):
            raise ValueError(f"nonfinite is stop, skip or ignore, got {nonfinite!r}")
        self.name, self.optim, self.schedule, self.nonfinite = name, optim, schedule, nonfinite

    def loss(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch of B samples, a scalar to minimize."""
        raise NotImplementedError(f"{type(self).__name__} needs a loss()")

    def trainable_module(self) -> nn.Module:
        """The module whose parameters are optimized, and whose `no_weight_decay()` is respected."""
        return self.model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """The loss of a batch, or None for a batch that is skipped."""
        loss = self.loss(batch, batch_idx)
        if self.nonfinite != "ignore" and not self._finite(loss):
            self._record(float(loss.detach()), batch_idx)
            return None
        rate = max(group["lr"] for optimizer in self.trainer.optimizers for group in optimizer.param_groups)
        self.log_dict({"train/loss": loss, "train/lr": rate})
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Log the norm of the gradients before clipping."""
        trainer: Any = self.trainer
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            norm = get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
            self.log("train/grad_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def total(self, sums: Tensor) -> Tensor:
        """Add up sums over images over all processes; the result is float64, on the CPU.

        A mean over all images is a quotient of two totals. Lightning's own mean of shares that
        differ in size is wrong: it rounds the number of images per process down (#21859).
        """
        dtype = torch.float32 if self.device.type == "mps" else torch.float64  # there is no float64 on mps
        total = self.trainer.strategy.reduce(sums.to(self.device, dtype), reduce_op="sum")
        return cast(Tensor, total).cpu().double()

    def on_train_epoch_end(self) -> None:
        """Log how many damaged images were skipped, if the data set counts them."""
        dataset = getattr(self.trainer.train_dataloader, "dataset", None)
        skipped = getattr(getattr(dataset, "dataset", dataset), "skipped", None)
        if skipped is not None:
            self.log("train/skipped", float(skipped), sync_dist=True, reduce_fx="sum")

    def configure_model(self) -> None:
        """Shard the parameters over the processes of a ModelParallelStrategy by block (FSDP2)."""
        mesh = self.device_mesh
        if mesh is None or isinstance(next(self.parameters()), DTensor):
            return
        if mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                "models are sharded over data-parallel processes only: give ModelParallelStrategy data_parallel_size: "
                f"{mesh.size()} and tensor_parallel_size: 1"
            )
        for block in blocks(self.model):
            fully_shard(block, mesh=mesh["data_parallel"])
        # the other parameters are resharded after a forward too: callbacks always see shards
        fully_shard(self.model, mesh=mesh["data_parallel"], reshard_after_forward=True)

    def configure_optimizers(self) -> Any:
        """The optimizer, and its schedule that advances with every step."""
        optimizer = make_optimizer(self.trainable_module(), self.optim)
        schedule = make_schedule(optimizer, self.schedule, self.trainer.estimated_stepping_batches, self.optim.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As in `nn.Module`, but if `strict`, the error for weights that do not fit is one line."""
        if strict:
            check_fit(self, state_dict, self.name)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def _finite(self, loss: Tensor) -> bool:
        finite = bool(torch.isfinite(loss))
        distributed = self.trainer.world_size > 1  # all must decide alike: they wait for each other's gradients
        return self.trainer.strategy.reduce_boolean_decision(finite) if distributed else finite

    def _record(self, value: float, batch_idx: int) -> None:
        """Write to nonfinite.jsonl which batch it was, and stop if `nonfinite` is "stop"."""
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
        position = (
            f"step {trainer.global_step} (epoch {trainer.current_epoch}, batch {batch_idx}, rank {self.global_rank})"
        )
        if callback is not None and not trainer.fast_dev_run and not math.isfinite(value):
            row = {"step": trainer.global_step, "epoch": trainer.current_epoch, "batch": batch_idx}
            row |= {"rank": self.global_rank, "loss": str(value), "indices": [int(index) for index in indices]}
            with naming_os_errors(path), path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if self.nonfinite == "stop":
            raise ValueError(
                f"the loss is {'not finite in another process' if math.isfinite(value) else value} at {position}; "
                f"{path} has the indices of the images; resume from the last checkpoint with a lower optim.lr or with "
                "trainer.gradient_clip_val, or skip such batches with --model.nonfinite skip"
            )
        log.warning("skipped a batch: its loss is %s at %s", value, position)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a model, computed one after another: the members of its module lists."""
    for child in model.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield from child
