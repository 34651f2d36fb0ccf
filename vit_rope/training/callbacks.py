"""What happens around the steps: seeds, an average of the weights, checkpoints to go on from, a line of progress."""

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor

from .batches import reseed

try:
    import resource
except ImportError:  # on Windows
    resource: Any = None


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


class LastCheckpoint(Checkpoint):
    """Keep checkpoints/last.ckpt: after each epoch, within one every so many steps, and before a signal ends the run.

    It is written where a run can go on as if nothing had been: after an optimizer step, and after the validation that
    follows it if one does. Ctrl-C and SIGTERM (a queue's warning) wait for that moment; a second Ctrl-C does not.

    Args:
        dirpath: from `out`
        every_steps: optimizer steps between two savings within an epoch; 0 saves after epochs alone
    """

    def __init__(self, dirpath: str = "checkpoints", every_steps: int = 0):
        if every_steps < 0:
            raise ValueError(f"last.every_steps must be at least 0 (after each epoch alone), got {every_steps}")
        self.path, self.every_steps = Path(dirpath, "last.ckpt"), every_steps
        self.saved, self.wanted, self.signal = 0, False, 0
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._heed) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, loop = trainer.global_step, trainer.fit_loop
        due = self.every_steps and step % self.every_steps == 0 and step > self.saved
        self.wanted = bool(self.wanted or due or step == trainer.max_steps or self._signalled(trainer, batch_idx))
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        validates = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # Lightning asks it right after this
        if self.wanted and stepped and not trainer.is_last_batch and not validates:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.wanted and trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_last_batch or trainer.global_step > self.saved:  # else the run stops within the epoch
            self._save(trainer)

    def _save(self, trainer: Any) -> None:
        if not trainer.fast_dev_run:
            trainer.save_checkpoint(self.path, weights_only=False)
        self.wanted, self.saved = False, trainer.global_step
        if self.signal:
            name, run = signal.Signals(self.signal).name, self.path.parents[1]
            say(f"{name} ended the run after step {self.saved}; go on with: python train.py fit --ckpt_path {run}")
            sys.exit(128 + self.signal)

    def _heed(self, number: int, frame: Any) -> None:
        signal.signal(number, self.handlers[number])
        self.signal = number
        os.write(2, b"\nstopping after this step; again, and nothing is saved\n")  # print must not be interrupted

    def _signalled(self, trainer: Any, batch_idx: int) -> bool:
        """Whether a process was told to stop; several ask each other now and then, for it holds up their devices."""
        if trainer.world_size > 1 and batch_idx % trainer.log_every_n_steps == 0:
            if trainer.strategy.reduce_boolean_decision(bool(self.signal), all=False):
                self.signal = self.signal or signal.SIGTERM
                return True
            return False
        return bool(self.signal) and trainer.world_size == 1


class ProgressLine(ProgressBar):
    """One bar for the whole run on a terminal, one line an epoch elsewhere: loss, accuracy, images/s, time left, GB.

    Logs `train/images_per_s` of each epoch, and `train/memory_gb`, the most that was in use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.on = True
        self.shown: dict[str, float] = {}
        self.total: int | None = None
        self.batches, self.images, self.started, self.epoch_started = 0, 0, 0.0, 0.0
        self.recent: deque[tuple[float, int]] = deque(maxlen=50)

    def enable(self) -> None:
        self.on = True

    def disable(self) -> None:
        self.on = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.images, self.started = 0, time.monotonic()
        self.epoch_started = self.started
        parameters = sum(p.numel() for p in pl_module.parameters()) / 1e6
        if self.on:
            name = getattr(pl_module, "name", type(pl_module).__name__)
            steps = trainer.num_training_batches
            text = f"{name}: {parameters:.2f} M parameters on {pl_module.device}, {steps} batches an epoch"
            self.console.print(text, highlight=False, soft_wrap=True)
        steps = trainer.estimated_stepping_batches
        if steps != float("inf"):
            self.total = max(1, (int(steps) - trainer.global_step) * trainer.accumulate_grad_batches)
        self._open(self.total)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.images, self.epoch_started = 0, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        size = len(batch[0] if isinstance(batch, (list, tuple)) else batch) * trainer.world_size
        self.batches, self.images = self.batches + 1, self.images + size
        self.recent.append((time.monotonic(), size))
        if self.bar is not None and self.batches % 5 == 0:
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            self.shown["loss"] = float(loss)
            (then, skipped), (now, _) = self.recent[0], self.recent[-1]
            speed = (sum(n for _, n in self.recent) - skipped) / max(now - then, 1e-9)
            self.bar.update(self.task, completed=self.batches, text=self._text(trainer, speed))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the clock still runs over validation, so that the time left is honest; the speed is the training's alone
        speed = self.images / max(self.recent[-1][0] - self.epoch_started, 1e-9) if self.recent else 0.0
        pl_module.log("train/images_per_s", speed, sync_dist=True)
        pl_module.log("train/memory_gb", memory_gb(pl_module.device), sync_dist=True, reduce_fx="max")
        for name in ("train/loss", "val/loss", "val/acc"):
            if name in trainer.callback_metrics:
                self.shown[name.replace("train/", "")] = float(trainer.callback_metrics[name])
        text = self._text(trainer, speed)
        if self.bar is not None:
            self.bar.update(self.task, completed=self.batches, text=text)
        elif self.on:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.bar is not None and trainer.state.fn == "fit":
            self.bar.update(self.task, text=f"epoch {trainer.current_epoch + 1}  validating, batch {batch_idx + 1}")
        elif self.bar is not None:
            total = sum(trainer.num_val_batches if trainer.state.fn == "validate" else trainer.num_test_batches)
            self.bar.update(self.task, completed=batch_idx + 1, total=total, text=f"batch {batch_idx + 1} of {total}")

    on_test_batch_end = on_validation_batch_end

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._open(None)

    on_test_start = on_validation_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._close()

    on_test_end = on_validation_end

    def _open(self, total: int | None) -> None:
        if self.on and self.console.is_terminal:
            text = TextColumn("{task.percentage:>3.0f}%  {task.fields[text]}", table_column=Column(no_wrap=True))
            self.bar = Progress(text, BarColumn(None), console=self.console, expand=True, refresh_per_second=4)
            self.task = self.bar.add_task("", total=total, text="starting")
            self.bar.start()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _text(self, trainer: Trainer, speed: float) -> str:
        shown = dict(self.shown)
        if self.bar is not None and "val/acc" in shown:
            shown.pop("val/loss", None)  # a terminal is 80 characters wide
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
        last = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
        text = f"epoch {trainer.current_epoch + 1}{last}  {numbers}  {speed:,.0f} images/s"
        if self.total and self.batches:
            left = (time.monotonic() - self.started) / self.batches * max(0, self.total - self.batches)
            text += f"  {_clock(left)} left"
        return f"{text}  {memory_gb(trainer.strategy.root_device):.1f} GB"


@rank_zero_only
def say(text: str) -> None:
    """A line for the one who watches, on stderr."""
    print(text, file=sys.stderr, flush=True)


def memory_gb(device: torch.device) -> float:
    """The most memory this process had in use: of the GPU that it trains on, else of its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def _of_this_process(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tensors, or the shards that this process has of them."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in (t.detach() for t in tensors)]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
