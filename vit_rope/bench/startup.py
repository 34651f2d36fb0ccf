"""Starting: importing the library against importing timm, and showing help against importing torch."""

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence

from .measure import Ratio, compared

PAIRS = {  # group: reference and candidate, as arguments of a fresh interpreter
    "import": {"import timm": ["-c", "import timm"], "import vit_rope": ["-c", "import vit_rope"]},
    "help": {"import torch": ["-c", "import torch"], "vit-rope --help": []},
}


def bench(rounds: int = 15) -> list[Ratio]:
    """Whole processes in turns, by the wall clock."""
    script = shutil.which("vit-rope")
    if script is None:
        raise ValueError("vit-rope is not on the path; install the package first")
    found = []
    for group, pair in PAIRS.items():
        commands = {name: [sys.executable, *args] if args else [script, "--help"] for name, args in pair.items()}
        seen: dict[str, list[float]] = {name: [] for name in commands}
        for index in range(rounds + 1):  # the first fills the caches of the file system
            for name in sorted(commands, reverse=bool(index % 2)):
                spent = _seconds(commands[name])
                if index:
                    seen[name].append(spent)
        found += compared(group, seen, next(iter(commands)))
    return found


def _seconds(command: Sequence[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start
