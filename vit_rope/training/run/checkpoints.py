"""How a run ends, and where it goes on: the last checkpoint, signals, processes that die."""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ...files import naming_os_errors, replacing
from .progress import print_status


class LastCheckpoint(Checkpoint):
    """Keep checkpoints/last.ckpt: after each epoch, within one every so many steps, and before a signal ends the run.

    It is written where a run can go on as if nothing had been: after an optimizer step, and after the validation that
    follows it if one does. Ctrl-C and SIGTERM (a queue's warning) wait for that moment; a second Ctrl-C does not.

    Args:
        dirpath: from `out`
        every_steps: optimizer steps between two savings within an epoch; 0 saves after epochs alone
    """

    imports: Sequence[str] = ()  # modules of the user's that the run needs

    def __init__(self, dirpath: str = "checkpoints", every_steps: int = 0):
        if every_steps < 0:
            raise ValueError(f"last.every_steps must be at least 0 (after each epoch alone), got {every_steps}")
        self.path, self.every_steps = Path(dirpath, "last.ckpt"), every_steps
        self.saved, self.wanted, self.signal, self.agreed = 0, False, 0, False
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._heed) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def on_exception(self, trainer: Any, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)
        if isinstance(exception, KeyboardInterrupt) and trainer.state.fn == "fit":
            go_on = f"stopped at once; step {self.saved} is saved, go on with: {self._command()}"
            print_status(go_on if self.saved else "stopped before a step was saved; the same command starts again")
        for rank, code in ended(getattr(trainer.strategy.launcher, "procs", [])):
            print_status(f"process {rank} ended before the others, with status {code}: what it said is above")

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
        if self.signal and (self.agreed or trainer.world_size == 1):  # nobody leaves the others alone
            name = signal.Signals(self.signal).name
            print_status(f"{name} ended the run after step {self.saved}; go on with: {self._command()}")
            sys.exit(128 + self.signal)

    def _command(self) -> str:
        imports = [word for module in self.imports for word in ("--import", module)]
        return shlex.join(["python", "train.py", "fit", *imports, "--ckpt_path", str(self.path.parents[1])])

    def _heed(self, number: int, frame: Any) -> None:
        signal.signal(number, self.handlers[number])
        self.signal = number
        os.write(2, b"\nstopping after this step; again, and nothing is saved\n")  # print must not be interrupted

    def _signalled(self, trainer: Any, batch_idx: int) -> bool:
        """Whether a process was told to stop; several ask each other now and then, for it holds up their devices."""
        if trainer.world_size > 1 and batch_idx % trainer.log_every_n_steps == 0:
            if trainer.strategy.reduce_boolean_decision(bool(self.signal), all=False):
                self.signal, self.agreed = self.signal or signal.SIGTERM, True
            return self.agreed
        return bool(self.signal) and trainer.world_size == 1


def ended(processes: Sequence[Any], patience: float = 1.0) -> list[tuple[int, int]]:
    """(rank, exit status) of those of Lightning's processes that failed; negative for a signal, -9 when killed.

    Their end breaks the connection first, which is how the first process learns of it, so they get a moment.
    """
    until = time.monotonic() + patience
    while processes and all(process.poll() is None for process in processes) and time.monotonic() < until:
        time.sleep(0.05)
    return [(rank, process.poll()) for rank, process in enumerate(processes, start=1) if process.poll()]


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, keeping checkpoints/best.ckpt alone, also in a folder that was moved or copied.

    Lightning forgets the best score where the folder has another name than before, and overwrites a better checkpoint.
    Raises ValueError for another `filename` and for other numbers of checkpoints, which nothing here would find again.
    """

    def __init__(self, dirpath: str | None = None, filename: str = "best", save_top_k: int = 1, **kwargs: Any):
        if save_top_k != 1 or filename != "best":
            raise ValueError(
                "a run keeps its best checkpoint as best.ckpt, and last.ckpt: leave out checkpoint.save_top_k and "
                f"checkpoint.filename, got {save_top_k} and {filename!r} for 1 and 'best'"
            )
        super().__init__(dirpath=dirpath, filename=filename, save_top_k=save_top_k, **kwargs)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._check_monitors(trainer, type(pl_module).__name__)
        super().on_validation_end(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Any, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the files of the run that goes on to lie where its checkpoint does now, and what is gone for gone."""
        state = checkpoint["callbacks"].get(self.state_key)
        if not state or not state["best_model_path"]:
            return
        here = Path(trainer.ckpt_path).resolve().parent
        best = str(here / Path(state["best_model_path"]).name)
        if Path(best).is_file():
            scores = {best: state["best_model_score"]} if state["best_k_models"] else {}
            moved = {"dirpath": str(here), "best_k_models": scores, "kth_best_model_path": best if scores else ""}
            state |= moved | {"best_model_path": best}
        else:
            state |= {"dirpath": None, "best_model_path": ""}

    def _check_monitors(self, trainer: Any, name: str) -> None:
        """Look, first before the first epoch, whether the scores come that this and stopping early wait for."""
        scores = sorted(score for score in trainer.callback_metrics if score.startswith("val/"))
        for callback in trainer.callbacks:
            monitor = getattr(callback, "monitor", None) if getattr(callback, "strict", True) else None
            if isinstance(monitor, str) and monitor.startswith("val/") and monitor not in scores:
                setting = "checkpoint.monitor" if callback is self else f"the monitor of {type(callback).__name__}"
                raise ValueError(
                    f"{setting} is {monitor}, which {name} does not log: "
                    f"choose one of {', '.join(scores)}, and the mode for it, min or max"
                )


class AtomicIO(TorchCheckpointIO):
    """Checkpoints by `replacing`; Lightning's own go through another folder and may be cut short on the way back."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if "://" in str(path):  # a bucket, whose uploads are whole or not there by themselves
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            with naming_os_errors(path):  # a run's folder that is gone is not made again: who knows on which disk
                Path(path).parent.mkdir(exist_ok=True)
            with replacing(path) as file:
                torch.save(checkpoint, file)
