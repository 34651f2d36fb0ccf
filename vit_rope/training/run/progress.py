"""The progress of a run on stderr, with speed, time left and memory."""

import sys
import time
from collections import deque
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

try:
    import resource
except ImportError:  # on Windows
    resource: Any = None


@rank_zero_only
def print_status(text: str) -> None:
    """Print a line to stderr, in the first process only."""
    print(text, file=sys.stderr, flush=True)


class ProgressLine(ProgressBar):
    """One bar for the entire run on a terminal, otherwise one line per epoch.

    Shows loss, accuracy, images/s, time left and memory in GB. Logs `train/images_per_s` of each
    epoch, and `train/memory_gb`, the peak memory. Lightning's RichProgressBar starts a bar for each
    epoch, shows the time left of that epoch only, and is made for terminals.
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
        """Print nothing; Lightning calls this in all processes but the first."""
        self.on = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.images, self.started = 0, time.monotonic()
        self.epoch_started = self.started
        parameters = sum(p.numel() for p in pl_module.parameters()) / 1e6
        if self.on:
            name = getattr(pl_module, "name", type(pl_module).__name__)
            steps = trainer.num_training_batches
            text = f"{name}: {parameters:.2f} M parameters on {pl_module.device}, {steps} batches per epoch"
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
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            if loss is not None:  # None: the batch was skipped
                self.shown["loss"] = float(loss)
            (first_time, first_images), (last_time, _) = self.recent[0], self.recent[-1]
            speed = (sum(n for _, n in self.recent) - first_images) / max(last_time - first_time, 1e-9)
            self.bar.update(self.task, completed=self.batches, text=self._text(trainer, speed))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # validation counts in the time left, but not in the training speed
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
        """Start the bar, on a terminal."""
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
        """Epoch, scores, speed, time left and memory on one line."""
        shown = dict(self.shown)
        if self.bar is not None and "val/acc" in shown:
            shown.pop("val/loss", None)  # to fit a terminal of 80 characters
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
        of_epochs = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
        text = f"epoch {trainer.current_epoch + 1}{of_epochs}  {numbers}  {speed:,.0f} images/s"
        if self.total and self.batches:
            left = (time.monotonic() - self.started) / self.batches * max(0, self.total - self.batches)
            text += f"  {_clock(left)} left"
        return f"{text}  {memory_gb(trainer.strategy.root_device):.1f} GB"


def memory_gb(device: torch.device) -> float:
    """The peak memory of this process in GB: of the GPU that it trains on, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
