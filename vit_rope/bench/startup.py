"""Start-up time: importing the library against timm, and showing help against importing torch."""

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

from .measure import Ratio, time_ratios

PAIRS = {  # group: reference and candidate, as arguments of a new interpreter
    "import": {"import timm": ["-c", "import timm"], "import vit_rope": ["-c", "import vit_rope"]},
    "help": {"import torch": ["-c", "import torch"], "vit-rope --help": []},
}


def bench(rounds: int = 15) -> list[Ratio]:
    """Wall-clock times of new processes that run alternately."""
    script = shutil.which("vit-rope")
    if script is None:
        raise ValueError("the command vit-rope is not on the PATH; install the package first")
    results = []
    for group, pair in PAIRS.items():
        commands = {name: [sys.executable, *args] if args else [script, "--help"] for name, args in pair.items()}
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for index in range(rounds + 1):  # the first fills the file system cache and does not count
            for name in sorted(commands, reverse=bool(index % 2)):
                elapsed = _process_seconds(commands[name])
                if index:
                    seconds[name].append(elapsed)
        results += time_ratios(group, seconds, next(iter(commands)))
    return results


def _process_seconds(command: Sequence[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start
