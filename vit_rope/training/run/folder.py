"""The folder that keeps a run: config.yaml, metrics.jsonl, checkpoints/, and at the end exported/ and summary.json."""

import json
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

from ... import files
from ...files import naming_os_errors, replacing
from .checkpoints import BestCheckpoint
from .locks import FolderLock
from .progress import print_status

RUN_FILES = ("config.yaml", "metrics.jsonl", "nonfinite.jsonl", "summary.json", "checkpoints", "exported", "samples")


class RunFolder(SaveConfigCallback):
    """Write the configuration down, also into each checkpoint; at the end export the best one and say how it went."""

    lock: FolderLock | None = None
    wrote = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.started = time.monotonic()

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(self.config.out)  # touched no earlier, when data, model and optimizer are known to be sound
        self.lock = FolderLock(folder)
        with naming_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.lock.take()
        check_free(folder, self.config.ckpt_path, self.config.overwrite)  # again, for a run that has ended since
        if self.config.overwrite:
            with naming_os_errors(folder):
                clear(folder)
        write(folder / "config.yaml", self._dump())
        self.wrote = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.lock is not None:
            self.lock.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        folder = Path(self.config.out)
        if self.wrote and existing_run_files(folder) == [
            "config.yaml"
        ]:  # no run yet: the next try finds the folder free
            with suppress(OSError):
                (folder / "config.yaml").unlink()
        self.teardown(trainer, pl_module, "fit")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self._dump()

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        seconds = time.monotonic() - self.started
        best, folder = trainer.checkpoint_callback, Path(self.config.out)
        paths = [Path(getattr(best, "best_model_path", "")), folder / "checkpoints" / "last.ckpt"]
        path = next((path for path in paths if path.is_file()), None)
        if self._was_finished(trainer, folder) or not isinstance(best, BestCheckpoint) or path is None:
            return
        checkpoint = files.read(path)
        pixels = {key: getattr(getattr(trainer, "datamodule", None), key, None) for key in ("mean", "std")}
        pixels = {key: _three(value) for key, value in pixels.items() if value is not None}
        exported = pl_module.export(folder / "exported", checkpoint["state_dict"], pixels)
        monitor = str(best.monitor)
        score = best.best_model_score if path == paths[0] else trainer.callback_metrics.get(monitor)
        summary: dict[str, Any] = {
            monitor: None if score is None else round(float(score), 6),
            "epoch": checkpoint["epoch"] + 1,
            "checkpoint": str(path),
            "exported": str(exported),
            "seconds": round(seconds, 1),
            "last": {key: round(float(value), 6) for key, value in trainer.callback_metrics.items()},
        }
        write(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        report(summary, monitor, folder)

    def _was_finished(self, trainer: Any, folder: Path) -> bool:
        """Whether no step was left to make, nor anything else, as after a run that was killed while it exported."""
        given = self.config.ckpt_path
        if self.lock is not None or not given:
            return False
        print_status(
            f"{given} had finished at epoch {trainer.current_epoch}, step {trainer.global_step}: nothing was trained; "
            "raise --trainer.max_epochs or --trainer.max_steps to go on"
        )
        return not is_resume(folder, given) or (folder / "summary.json").exists()

    def _dump(self) -> str:
        config = self.config.clone()  # as it would start afresh
        config.overwrite, config.ckpt_path = False, None
        return self.parser.dump(config, skip_none=False)


def report(summary: dict[str, Any], monitor: str, folder: Path) -> None:
    """Print what a run reached and where everything lies; the last line is the score alone."""
    table = Table(show_header=False, title=str(folder), title_justify="left")
    last = summary["last"].get(monitor)
    rows = {
        f"best {monitor}": f"{_score(summary[monitor])} (epoch {summary['epoch']})",
        f"last {monitor}": _score(last),
        "time": f"{summary['seconds']:.0f} s",
        "best checkpoint": summary["checkpoint"],
        "to go on from": str(folder / "checkpoints" / "last.ckpt"),
        "exported weights": summary["exported"],
        "all numbers": str(folder / "metrics.jsonl"),
    }
    for key, value in rows.items():
        table.add_row(key, value, end_section=key == "time")
    Console(width=1000).print(table)  # as wide as its longest path, which nobody could copy from two lines
    print(f"{monitor} {_score(summary[monitor])}", flush=True)


def existing_run_files(folder: Path) -> list[str]:
    """What an earlier run left in a folder."""
    return [name for name in RUN_FILES if (folder / name).exists()]


def is_resume(folder: Path, ckpt_path: str | None) -> bool:
    """Whether a checkpoint is one of the run in this folder."""
    return bool(ckpt_path) and Path(str(ckpt_path)).resolve().is_relative_to(folder.resolve())


def check_free(folder: Path, ckpt_path: str | None, overwrite: bool = False) -> None:
    """Raise a ValueError where a run would take a folder from another, or the checkpoint to go on with from itself."""
    resumes = is_resume(folder, ckpt_path)
    if resumes and overwrite:
        raise ValueError(f"--overwrite true would remove {ckpt_path}, with which --ckpt_path goes on: leave out one")
    if not resumes and not overwrite and (found := existing_run_files(folder)):
        raise ValueError(
            f"{folder} already holds a run ({', '.join(found)}): go on with --ckpt_path last, "
            "replace it with --overwrite true, or choose another --out"
        )


def clear(folder: Path) -> None:
    """Remove a run from its folder, and nothing else that lies there."""
    for name in existing_run_files(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def _score(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _three(value: Any) -> list[float]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * 3
