"""Reports of ratios: a table on the terminal, and a CSV or JSON file with the conditions."""

import csv
import importlib.metadata
import json
import math
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from .measure import Ratio


def show(results: Sequence[Ratio]) -> None:
    """Print ratios as a table."""
    table = Table("group", "candidate", "ratio", "quartiles", "took", title="ratios to the first of each group")
    last = ""
    for row in results:
        if row.group != last and last:
            table.add_section()
        quartiles, took = f"{row.low:.3f} to {row.high:.3f}", amount(row.took, row.unit)
        table.add_row(row.group if row.group != last else "", row.candidate, f"{row.median:.3f}", quartiles, took)
        last = row.group
    Console().print(table)


def amount(value: float, unit: str) -> str:
    """A value with three significant digits and a metric prefix, such as 1.23 ms."""
    power = math.floor(math.log10(value) / 3) if value > 0 else 0
    power = min(max(power, -3), 3)
    return f"{value / 1000**power:.3g} {('', 'k', 'M', 'G', 'n', 'µ', 'm')[power]}{unit}"


def write(results: Sequence[Ratio], path: Path) -> None:
    """Write ratios and the conditions of the run as JSON if the suffix is .json, else as CSV."""
    conditions = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.partition("+")[0],
        "commit": commit(),
        "command": "vit-rope " + " ".join(sys.argv[1:]),
    }
    rows = [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row._asdict().items()} for row in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        if path.suffix == ".json":
            json.dump([row | conditions for row in rows], file, indent=1)
        else:
            writer = csv.DictWriter(file, [*Ratio._fields, *conditions])
            writer.writeheader()
            writer.writerows(row | conditions for row in rows)


def processor() -> str:
    """The model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"


def commit() -> str:
    """The commit of the source, or the version of the package if it is not in a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True) if shutil.which("git") else None
    return done.stdout.strip() if done and not done.returncode else importlib.metadata.version("vit-rope")
