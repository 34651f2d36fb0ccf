"""The folder of a run: config.yaml, metrics.jsonl, checkpoints/, exported/ and summary.json."""

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
from .checkpoints import BestCheckpoint, LastCheckpoint, resume_command
from .locks import FolderLock
from .progress import print_status

RUN_FILES = ("config.yaml", "metrics.jsonl", "nonfinite.jsonl", "summary.json", "checkpoints", "exported", "samples")


class RunFolder(SaveConfigCallback):
    """Save the configuration, also in each checkpoint; after training export the best one, report.

    Unlike Lightning's SaveConfigCallback it locks the folder, refuses one that contains another
    run, and writes nothing before data, model and optimizer are known to work.
    """

    lock: FolderLock | None = None  # held from the start of training
    wrote_config = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.started = time.monotonic()

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(self.config.out)
        self.lock = FolderLock(folder)
        with naming_os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.lock.take()
        check_free(folder, self.config.ckpt_path, self.config.overwrite)  # again: another run may have ended since
        if self.config.overwrite:
            with naming_os_errors(folder):
                clear(folder)
        write_text(folder / "config.yaml", self._dump())
        self.wrote_config = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.lock is not None:
            self.lock.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        folder = Path(self.config.out)
        if self.wrote_config and existing_run_files(folder) == ["config.yaml"]:
            with suppress(OSError):  # nothing to keep yet: leave the folder free for the next attempt
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
        pixels = {key: _per_channel(value) for key, value in pixels.items() if value is not None}
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
        write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        report(summary, monitor, folder)

    def _was_finished(self, trainer: Any, folder: Path) -> bool:
        """Whether the resumed run had nothing left to train and its export is not missing."""
        ckpt_path = self.config.ckpt_path
        if self.lock is not None or not ckpt_path:
            return False
        imports = [
            name for callback in trainer.callbacks if isinstance(callback, LastCheckpoint) for name in callback.imports
        ]
        limit = "max_steps" if 0 <= trainer.max_steps <= trainer.global_step else "max_epochs"
        print_status(
            f"{ckpt_path} had finished at epoch {trainer.current_epoch}, step {trainer.global_step}: nothing was "
            f"trained. Train longer with: {resume_command(ckpt_path, imports, f'--trainer.{limit}')} N"
        )
        return not is_resume(folder, ckpt_path) or (folder / "summary.json").exists()

    def _dump(self) -> str:
        """The configuration as YAML, without what concerns this start of the run only."""
        config = self.config.clone()
        config.overwrite, config.ckpt_path = False, None
        return self.parser.dump(config, skip_none=False)


def report(summary: dict[str, Any], monitor: str, folder: Path) -> None:
    """Print the scores of a run and the paths of its files; the last line is only the score."""
    table = Table(show_header=False, title=str(folder), title_justify="left")
    last = summary["last"].get(monitor)
    rows = {
        f"best {monitor}": f"{_score(summary[monitor])} (epoch {summary['epoch']})",
        f"last {monitor}": _score(last),
        "time": f"{summary['seconds']:.0f} s",
        "best checkpoint": summary["checkpoint"],
        "resume from": str(folder / "checkpoints" / "last.ckpt"),
        "exported weights": summary["exported"],
        "metrics": str(folder / "metrics.jsonl"),
    }
    for key, value in rows.items():
        table.add_row(key, value, end_section=key == "time")
    Console(width=1000).print(table)  # wide, so that no path is split over two lines
    print(f"{monitor} {_score(summary[monitor])}", flush=True)


def existing_run_files(folder: Path) -> list[str]:
    """The names of the files and folders that an earlier run left in a folder."""
    return [name for name in RUN_FILES if (folder / name).exists()]


def is_resume(folder: Path, ckpt_path: str | None) -> bool:
    """Whether a checkpoint belongs to the run in this folder."""
    return bool(ckpt_path) and Path(ckpt_path).resolve().is_relative_to(folder.resolve())


def check_free(folder: Path, ckpt_path: str | None, overwrite: bool = False) -> None:
    """Raise ValueError if a run would overwrite another, or the checkpoint that it resumes."""
    resumes = is_resume(folder, ckpt_path)
    if resumes and overwrite:
        raise ValueError(
            f"--overwrite true would remove {ckpt_path}, which --ckpt_path resumes: leave out one of the two"
        )
    if not resumes and not overwrite and (existing := existing_run_files(folder)):
        raise ValueError(
            f"{folder} already contains a run ({', '.join(existing)}): resume it with --ckpt_path last, "
            "replace it with --overwrite true, or choose a different --out"
        )


def clear(folder: Path) -> None:
    """Remove the files of a run from its folder, and nothing else."""
    for name in existing_run_files(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as file:
        file.write(text.encode())


def _score(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _per_channel(value: Any) -> list[float]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * 3
