"""The metrics of a run, one JSON object per line of `metrics.jsonl`, which is append-only."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ...files import expand_home, naming_os_errors


class MetricsLogger(Logger):
    """Append the metrics of each logged step to `out`/metrics.jsonl.

    A row holds `stage` (fit, validate or test), `step`, `epoch`, `time` (seconds since 1970) and
    the metrics. Numbers that are not finite are strings, since JSON has no other notation for them.
    A run that was killed and resumed logs the steps since its checkpoint again: if a step occurs
    twice, the later row counts. Lightning's CSVLogger is not used because it deletes its file when
    a run is resumed, and even when it is only validated.

    Args:
        out: the folder of the run
        stage: the command: fit, validate or test
    """

    def __init__(self, out: str, stage: str = "fit"):
        super().__init__()
        self.out, self.stage, self.rows = expand_home(out), stage, 0

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
        """The path of the file."""
        return Path(self.out, "metrics.jsonl")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {key: _to_json(value) for key, value in metrics.items()}
        row = {"stage": self.stage, "step": step, "epoch": values.pop("epoch", None), "time": round(time.time(), 2)}
        path = Path(self.out, "metrics.jsonl")
        with naming_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab+") as file:
                if not self.rows:
                    drop_partial_line(file)
                file.write((json.dumps(row | values) + "\n").encode())
        self.rows += 1

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the settings are in config.yaml."""


def drop_partial_line(file: Any) -> None:
    """Cut off an unfinished last line, left by a full disk or a power cut."""
    end = file.seek(0, os.SEEK_END)
    start = max(0, end - 2**20)
    file.seek(start)
    tail = file.read()
    if tail and not tail.endswith(b"\n"):
        file.truncate(start + tail.rfind(b"\n") + 1)


def _to_json(value: Any) -> float | str:
    """A number with six significant digits, or a string if it is not finite."""
    number = float(value)
    if not math.isfinite(number):
        return str(number)
    return int(number) if number.is_integer() else float(f"{number:.6g}")
