"""The two checkpoints of a run, last.ckpt and best.ckpt: when they are written, how a run resumes.

Signals (Ctrl-C, a scheduler's SIGTERM) and processes that die are handled here too, because they
decide when last.ckpt is written and what the user is told.
"""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ...files import expand_home, naming_os_errors, replacing
from .progress import print_status


class LastCheckpoint(Checkpoint):
    """Keep checkpoints/last.ckpt, from which a run resumes.

    It is written after each epoch, every `every_steps` steps, and before a signal ends the run, and
    only where a resumed run is bit-identical to an uninterrupted one: after an optimizer step, and
    after the validation that follows it, if there is one. Lightning's ModelCheckpoint saves before
    that validation, so its score would be lost, and its OnExceptionCheckpoint within a step. Ctrl-C
    and SIGTERM wait for that moment; a second Ctrl-C does not.

    Args:
        dirpath: the folder of the file, set from `out`
        every_steps: save every this many optimizer steps, too; 0 saves after epochs only
    """

    imports: Sequence[str] = ()  # the modules of --import, which the resumed run needs too

    def __init__(self, dirpath: str = "checkpoints", every_steps: int = 0):
        if every_steps < 0:
            raise ValueError(f"last.every_steps must be at least 0 (after each epoch only), got {every_steps}")
        self.path, self.every_steps = Path(expand_home(dirpath), "last.ckpt"), every_steps
        self.saved, self.requested, self.signal, self.agreed = 0, False, 0, False
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self.handlers = {
                number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)
            }

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def on_exception(self, trainer: Any, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)
        if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == "fit":
            if self.saved:
                print_status(f"Interrupted; the last saved step is {self.saved}. Resume with: {self._command()}")
            else:
                print_status("Interrupted before a step was saved. Run the same command again to start over")
        for rank, code in failed_processes(getattr(trainer.strategy.launcher, "procs", [])):
            print_status(f"process {rank} ended before the others, with status {code}; its output is above")

    def on_train_batch_end(
        self, trainer: Any, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, loop = trainer.global_step, trainer.fit_loop
        due = self.every_steps and step % self.every_steps == 0 and step > self.saved
        is_last = step == trainer.max_steps
        self.requested = bool(self.requested or due or is_last or self._signalled(trainer, batch_idx))
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        validates = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # as Lightning decides right after this
        if self.requested and stepped and not trainer.is_last_batch and not validates:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.requested and trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_last_batch or trainer.global_step > self.saved:  # otherwise the run stops within the epoch
            self._save(trainer)

    def _save(self, trainer: Any) -> None:
        """Write the checkpoint; end the process if a signal arrived and all processes agreed."""
        if not trainer.fast_dev_run:
            trainer.save_checkpoint(self.path, weights_only=False)
        self.requested, self.saved = False, trainer.global_step
        if self.signal and (self.agreed or trainer.world_size == 1):
            print_status(f"Interrupted after step {self.saved}. Resume with: {self._command()}")
            sys.exit(128 + self.signal)

    def _command(self) -> str:
        return resume_command(self.path.parents[1], self.imports)

    def _on_signal(self, number: int, frame: Any) -> None:
        signal.signal(number, self.handlers[number])
        self.signal = number
        # print is not safe in a signal handler
        os.write(2, b"\nstopping after this step (Ctrl-C again: quit without saving)\n")

    def _signalled(self, trainer: Any, batch_idx: int) -> bool:
        """Whether to stop; several processes agree on it every `log_every_n_steps` batches.

        Not more often, because it makes the host wait for the devices.
        """
        if trainer.world_size > 1 and batch_idx % trainer.log_every_n_steps == 0:
            if trainer.strategy.reduce_boolean_decision(bool(self.signal), all=False):
                self.signal, self.agreed = self.signal or signal.SIGTERM, True
            return self.agreed
        return bool(self.signal) and trainer.world_size == 1


def resume_command(ckpt_path: str | Path, imports: Sequence[str] = (), *options: str) -> str:
    """The shell command that resumes a checkpoint or run folder, by the program that runs now.

    That program is train.py, `python -m vit_rope` or, for any other caller, `vit-rope`. `imports`
    are the modules of --import.
    """
    program = Path(sys.argv[0])
    words = ["vit-rope"]
    if program.name == "train.py":
        words = ["python", sys.argv[0]]
    elif program.name == "__main__.py" and program.parent.name == "vit_rope":
        words = ["python", "-m", "vit_rope"]
    flags = [word for module in imports for word in ("--import", module)]
    return shlex.join([*words, "fit", *flags, "--ckpt_path", str(ckpt_path), *options])


def failed_processes(processes: Sequence[Any], patience: float = 1.0) -> list[tuple[int, int]]:
    """(rank, exit status) of Lightning's processes that failed; minus the signal, -9 if killed.

    The first process learns of it by a broken connection, shortly before the exit status is known;
    `patience` is how long to wait for that, in seconds.
    """
    deadline = time.monotonic() + patience
    while processes and all(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [(rank, process.poll()) for rank, process in enumerate(processes, start=1) if process.poll()]


def best_mode(monitor: str | None) -> Literal["min", "max"] | None:
    """Whether a score is best at its lowest or highest value; None if its name does not tell."""
    name = (monitor or "").rpartition("/")[2]
    if "loss" in name:
        return "min"
    return "max" if "acc" in name else None


def check_mode(setting: str, monitor: str | None, mode: str | None) -> None:
    """Raise ValueError if `mode` would choose the worst value of the monitored score."""
    best = best_mode(monitor)
    if best is not None and mode in ("min", "max") and mode != best:
        raise ValueError(f"{setting} is {monitor}, and its mode {mode} chooses the worst: set its mode to {best}")


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, keeping checkpoints/best.ckpt only, also in a moved run folder.

    Lightning's own forgets the best score if the folder has a different name than before, and then
    overwrites a better checkpoint; and it finds a monitor that nobody logs only after an epoch.

    Args:
        dirpath: the folder of the file, set from `out`
        filename: must be "best"
        save_top_k: must be 1
        monitor: the score that chooses the checkpoint
        mode: whether the lowest or the highest score is best; auto is min for a loss and max for an
            accuracy
        kwargs: those of ModelCheckpoint

    Raises ValueError for a different `filename` or `save_top_k`, because other commands look for
    best.ckpt, and for a mode that would keep the worst.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str = "best",
        save_top_k: int = 1,
        monitor: str | None = None,
        mode: Literal["auto", "min", "max"] = "auto",
        **kwargs: Any,
    ):
        if save_top_k != 1 or filename != "best":
            raise ValueError(
                "a run keeps best.ckpt and last.ckpt only: leave out checkpoint.save_top_k and checkpoint.filename, "
                f"which must be 1 and 'best', got {save_top_k} and {filename!r}"
            )
        best = "min" if monitor is None else best_mode(monitor)
        if mode == "auto" and best is None:
            raise ValueError(
                f"checkpoint.monitor is {monitor}, neither a loss nor an accuracy: set checkpoint.mode to min or max"
            )
        check_mode("checkpoint.monitor", monitor, mode)
        mode = best if mode == "auto" and best is not None else mode
        own: dict[str, Any] = {"dirpath": dirpath, "filename": filename, "save_top_k": save_top_k}
        super().__init__(**own, monitor=monitor, mode=mode, **kwargs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._check_monitors(trainer, type(pl_module).__name__)
        super().on_validation_end(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Any, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look for the best checkpoint next to the resumed one, and forget it if it is gone."""
        state = checkpoint["callbacks"].get(self.state_key)
        if not state or not state["best_model_path"]:
            return
        folder = Path(trainer.ckpt_path).resolve().parent
        best = str(folder / Path(state["best_model_path"]).name)
        if Path(best).is_file():
            scores = {best: state["best_model_score"]} if state["best_k_models"] else {}
            moved = {"dirpath": str(folder), "best_k_models": scores, "kth_best_model_path": best if scores else ""}
            state |= moved | {"best_model_path": best}
        else:
            state |= {"dirpath": None, "best_model_path": ""}

    def _check_monitors(self, trainer: Any, name: str) -> None:
        """Raise ValueError if a callback monitors a score that nobody logs, or its worst value.

        Lightning's validation before the first epoch calls this, so the run ends before it trains.
        """
        scores = sorted(score for score in trainer.callback_metrics if score.startswith("val/"))
        for callback in trainer.callbacks:
            monitor = getattr(callback, "monitor", None) if getattr(callback, "strict", True) else None
            setting = "checkpoint.monitor" if callback is self else f"the monitor of {type(callback).__name__}"
            check_mode(setting, monitor, getattr(callback, "mode", None))
            if isinstance(monitor, str) and monitor.startswith("val/") and monitor not in scores:
                raise ValueError(
                    f"{setting} is {monitor}, which {name} does not log: "
                    f"choose one of {', '.join(scores)}, and its mode, min or max"
                )


class AtomicIO(TorchCheckpointIO):
    """Checkpoints written by `files.replacing`.

    Lightning's own writes to a temporary folder, possibly on another disk, and copies the file from
    there, which can be cut short.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if "://" in str(path):  # a bucket, whose uploads are atomic
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            with naming_os_errors(path):  # not `parents`: a run folder that is gone, say unmounted, is an error
                Path(path).parent.mkdir(exist_ok=True)
            with replacing(path) as file:
                torch.save(checkpoint, file)
