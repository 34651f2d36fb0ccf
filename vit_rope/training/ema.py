"""An exponential moving average of the weights, for validation, checkpoints and export."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor


class EMA(Callback):
    """Validate and export an exponential moving average of the weights.

    The decay after n updates is d_n = min(decay, (1 + n) / (10 + n)), so that short runs can use a
    long average. The average is kept in float32 for weights of lower precision: in bfloat16 an
    update at decay 0.999 is rounded away. Buffers are not averaged.

    The `state_dict` of a checkpoint is the average, so that code that loads it gets the better
    weights. The trained weights are saved under `weights_in_training`, for resuming.

    Not a subclass of Lightning's `WeightAveraging` (2.6), which copies the module with `deepcopy`:
    parameters that FSDP2 has sharded raise "FSDP does not support deepcopy" there. It also swaps
    the average into the weights and back around a validation, which rounds the average to the
    precision of the weights.

    Args:
        decay: the highest decay; 0 switches the average off
    """

    def __init__(self, decay: float = 0.0):
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay must be at least 0 (off) and below 1, got {decay}")
        self.decay, self.updates = decay, 0
        self.average: dict[str, Tensor] = {}
        self.trained: dict[str, Tensor] = {}  # the trained weights, while the module holds the average

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the average at the weights, or move a restored one to the device of the weights."""
        if self.decay:
            restored, self.average = self.average, _averages(pl_module)
            for name, value in restored.items():
                self.average[name].copy_(value)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after an optimizer step, with which not every batch ends."""
        if self.decay and trainer.global_step > self.updates:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            self.updates = trainer.global_step
            average = _local(self.average.values())
            weights = [
                weight.to(mean.dtype) for weight, mean in zip(_local(pl_module.parameters()), average, strict=True)
            ]
            torch._foreach_lerp_(average, weights, 1 - decay)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the trained weights with the average, once it has been updated."""
        if self.updates and self.average:
            self.trained = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
            _write(pl_module, self.average)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the trained weights back."""
        _write(pl_module, self.trained)
        self.trained = {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average as `state_dict` and the trained weights as `weights_in_training`."""
        if self.average:
            average = {name: _gathered(value) for name, value in self.average.items()}  # in all processes
            if state := checkpoint["state_dict"]:  # empty in all processes but the first, with shards
                checkpoint["weights_in_training"] = {name: state[name] for name in average}
                checkpoint["state_dict"] = {**state, **average}
                if any(state[name].dtype != value.dtype for name, value in average.items()):
                    checkpoint["averaged_weights"] = average  # shares the storage of `state_dict` in the file

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the average, which the module holds by now, and resume from the trained weights.

        Raises ValueError where some of `weights_in_training` are missing.
        """
        weights = checkpoint.get("weights_in_training")
        if weights is not None and trainer.state.fn == "fit":
            if lost := [name for name, _ in pl_module.named_parameters() if name not in weights]:
                raise ValueError(
                    f"the checkpoint's weights_in_training lack {lost[0]} ({len(lost)} missing); "
                    "use a different checkpoint, or leave out --ckpt_path to start from scratch"
                )
            self.average = _averages(pl_module) if self.decay else {}
            # a module of low precision holds a rounded average (not `state_dict`, which Lightning
            # removes from the checkpoints of sharded models)
            precise = checkpoint.get("averaged_weights", {})
            for name, value in self.average.items():
                if name in precise:
                    value.copy_(_sharded_like(value, precise[name]))
            set_model_state_dict(pl_module, weights, options=StateDictOptions(full_state_dict=True, strict=False))

    def state_dict(self) -> dict[str, Any]:
        """The number of updates; the average itself is in the checkpoint's `state_dict`."""
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of updates."""
        self.updates = state_dict["updates"]


def _averages(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters, in float32 at least."""
    return {
        name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
        for name, p in module.named_parameters()
    }


def _write(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy values into the parameters of these names."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in values:
                parameter.copy_(values[name])


def _local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Detached tensors; of sharded ones the shards of this process."""
    detached: Iterator[Tensor] = (tensor.detach() for tensor in tensors)
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in detached]


def _gathered(tensor: Tensor) -> Tensor:
    """A complete tensor, on the CPU where it was sharded; all processes take part."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def _sharded_like(target: Tensor, value: Tensor) -> Tensor:
    """A complete tensor that every process has, sharded as the target is."""
    if isinstance(target, DTensor):
        value = value.to(target.device)
        return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    return value
