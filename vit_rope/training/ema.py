"""What happens around the steps: seeds that make a run repeatable, and an average of the weights."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor


class EMA(Callback):
    """Validate and export an exponential moving average of the weights, d_n = min(decay, (1 + n) / (10 + n)) at step n.

    The growing decay lets short runs use a long average. A checkpoint's `state_dict` is the average, so that whoever
    loads it gets the better weights; those in training lie beside it, for resuming. Buffers are not averaged.

    Args:
        decay: the highest decay; 0 switches the average off
    """

    def __init__(self, decay: float = 0.0):
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay must be at least 0 (off) and below 1, got {decay}")
        self.decay, self.updates = decay, 0
        self.average: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.decay:
            restored, self.average = self.average, _copies(pl_module)
            for name, value in restored.items():
                self.average[name].copy_(value)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.decay and trainer.global_step > self.updates:  # an optimizer step ends only some of accumulated batches
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            self.updates = trainer.global_step
            with torch.no_grad():
                average, current = map(_of_this_process, (self.average.values(), pl_module.parameters()))
                torch._foreach_lerp_(average, current, 1 - decay)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.average:
            whole = {name: _whole(value) for name, value in self.average.items()}  # all processes take part in this
            if state := checkpoint["state_dict"]:  # and the first one saves, where parameters are in shards
                checkpoint["weights_in_training"] = {name: state[name] for name in whole}
                checkpoint["state_dict"] = {**state, **whole}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """By now the module holds the average: keep it, and go on from the weights in training."""
        weights = checkpoint.get("weights_in_training")
        if weights is not None and trainer.state.fn == "fit":
            if lost := [name for name, _ in pl_module.named_parameters() if name not in weights]:
                raise ValueError(
                    f"the checkpoint's weights_in_training lack {lost[0]} ({len(lost)} missing); "
                    "take another one, or leave out --ckpt_path to start afresh"
                )
            self.average = _copies(pl_module) if self.decay else {}
            set_model_state_dict(pl_module, weights, options=StateDictOptions(full_state_dict=True, strict=False))

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]

    @torch.no_grad()
    def _swap(self, pl_module: LightningModule) -> None:
        if self.updates:  # before the first update the average is only where the weights began
            for name, parameter in pl_module.named_parameters():
                if name in self.average:
                    kept = parameter.detach().clone()
                    parameter.copy_(self.average[name])
                    self.average[name].copy_(kept)


def _copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def _of_this_process(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tensors, or the shards that this process has of them."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in (t.detach() for t in tensors)]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
