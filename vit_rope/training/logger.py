"""A run's numbers as one JSON object a line in `metrics.jsonl`, which only ever grows."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class MetricsLogger(Logger):
    """Append the numbers of each logged step to `out`/metrics.jsonl, marked with the command (fit, validate, test).

    A row holds `stage`, `step`, `epoch`, `time` (seconds since 1970) and the metrics; a number that is not finite is
    written as a string, which JSON has no other way to say.
    """

    def __init__(self, out: str, stage: str = "fit"):
        super().__init__()
        self.out, self.stage = out, stage

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
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(row | values) + "\n")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The settings lie in config.yaml, not here."""


def _plain(value: Any) -> float | str:
    number = float(value)
    if not math.isfinite(number):
        return str(number)
    return int(number) if number.is_integer() else float(f"{number:.6g}")
