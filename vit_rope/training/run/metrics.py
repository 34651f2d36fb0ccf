"""A run's numbers as one JSON object a line in `metrics.jsonl`, which only ever grows."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ...files import naming_os_errors


class MetricsLogger(Logger):
    """Append the numbers of each logged step to `out`/metrics.jsonl, marked with the command (fit, validate, test).

    A row holds `stage`, `step`, `epoch`, `time` (seconds since 1970) and the metrics; a number that is not finite is
    written as a string, which JSON has no other way to say. A run that was killed and goes on from a checkpoint logs
    the steps since then once more: of two rows of one step the later one counts.
    """

    def __init__(self, out: str, stage: str = "fit"):
        super().__init__()
        self.out, self.stage, self.rows = out, stage, 0

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return self.out

    @property
    @rank_zero_experiment
    def experiment(self) -> Path:
        return Path(self.out, "metrics.jsonl")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {key: _plain(value) for key, value in metrics.items()}
        row = {"stage": self.stage, "step": step, "epoch": values.pop("epoch", None), "time": round(time.time(), 2)}
        path = Path(self.out, "metrics.jsonl")
        with naming_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                if not self.rows:
                    end_line(file)
                file.write((json.dumps(row | values) + "\n").encode())
        self.rows += 1

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The settings lie in config.yaml, not here."""


def end_line(file: Any) -> None:
    """Cut off a last line that a full disk or a power cut left unfinished: half a row is none."""
    end = file.seek(0, os.SEEK_END)
    start = max(0, end - 2**20)
    file.seek(start)
    tail = file.read()
    if tail and not tail.endswith(b"\n"):
        file.truncate(start + tail.rfind(b"\n") + 1)


def _plain(value: Any) -> float | str:
    number = float(value)
    if not math.isfinite(number):
        return str(number)
    return int(number) if number.is_integer() else float(f"{number:.6g}")
