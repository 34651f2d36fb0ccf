"""Speed as ratios, measured side by side in one process: `vit-rope bench rotation --out results/bench_rotation.csv`.

Candidates run in turns and are divided within each round, so that what else the machine does falls on all alike. On a
CPU with one thread the clock counts this process's own time. Medians come with quartiles; no test asserts a time.
"""

import argparse
import csv
import importlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

TOPICS = {
    "rotation": "rotating queries and keys, against copying them, beside other libraries",
    "model": "ViT-S/16 under the schemes that --specs names, and timm's own, against timm's plain one",
    "block": "a compiled ViT-S block, and the peak memory of an eager one, against none",
    "tables": "making the tables of turns, against a ViT-S block and timm",
    "growth": "time and memory against the number of tokens and of axes, with a plot",
    "unet": "training and sampling steps of U-Nets against diffusers' own",
    "startup": "importing the library and showing help, against timm and torch",
}
STEADY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}  # pages stay: faults would drown all else


class Ratio(NamedTuple):
    """What a candidate took against the reference of its group: median and quartiles over the rounds."""

    group: str
    candidate: str
    median: float
    low: float
    high: float
    rounds: int


def once(group: str, values: dict[str, float]) -> list[Ratio]:
    """Values that need no second look, such as bytes, against the first of them."""
    first = next(iter(values.values()))
    return [Ratio(group, name, value / first, value / first, value / first, 1) for name, value in values.items()]


def ratios(
    group: str, runs: dict[str, Callable[[], object]], rounds: int, at_least: float = 0.0, paired: str = ""
) -> list[Ratio]:
    """Time every run in turns, after one that is not counted, against the first of them, and against `paired` too.

    Each round takes the runs in another order. A run shorter than `at_least` seconds is repeated.
    """
    names = list(runs)
    cuda = torch.cuda.is_available()
    clock = time.perf_counter if cuda or torch.get_num_threads() > 1 else time.process_time

    def spend(name: str, repeats: int) -> float:
        if cuda:
            torch.cuda.synchronize()
        start = clock()
        for _ in range(repeats):
            runs[name]()
        if cuda:
            torch.cuda.synchronize()
        return (clock() - start) / repeats

    repeats = dict.fromkeys(names, 1)
    seen: dict[str, list[float]] = {name: [] for name in names}
    for index in track(range(rounds + 1), description=f"{group:<44}", console=Console(stderr=True)):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            spent = spend(name, repeats[name])
            if index:
                seen[name].append(spent)
            elif at_least:
                again = spend(name, 1)  # warm by now
                repeats[name] = max(1, round(at_least / max(again, 1e-7)))
    found = []
    for reference in [names[0], *([paired] if paired in names and paired != names[0] else [])]:
        title = group if reference == names[0] else f"{group}, against {reference}"
        for name in names:
            values = [a / b for a, b in zip(seen[name], seen[reference], strict=True)]
            low, median, high = statistics.quantiles(values, n=4)
            found.append(Ratio(title, name, median, low, high, rounds))
    return found


def report(found: Sequence[Ratio], out: str = "", title: str = "against the first of each group") -> None:
    """Print ratios as a table and, where `out` is given, write them as CSV with the conditions of the measurement."""
    table = Table("what", "candidate", "ratio", "quartiles", title=title)
    last = ""
    for row in found:
        if row.group != last and last:
            table.add_section()
        spread = f"{row.low:.3f} to {row.high:.3f}"
        table.add_row(row.group if row.group != last else "", row.candidate, f"{row.median:.3f}", spread)
        last = row.group
    Console().print(table)
    if out:
        conditions = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__.partition("+")[0],
            "command": "vit-rope " + " ".join(sys.argv[1:]),
        }
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*Ratio._fields, *conditions])
            writer.writeheader()
            for row in found:
                fields = {k: round(v, 4) if isinstance(v, float) else v for k, v in row._asdict().items()}
                writer.writerow(fields | conditions)
        print(path)


def processor() -> str:
    """What the CPU calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"


def main(args: Sequence[str] | None = None) -> None:
    """Run `vit-rope bench`."""
    topics = "\n".join(f"  {name:<10} {text}" for name, text in TOPICS.items())
    parser = argparse.ArgumentParser(
        "vit-rope bench",
        description=f"Measure speed as ratios, side by side:\n\n{topics}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("topic", choices=TOPICS, metavar="TOPIC", help=", ".join(TOPICS))
    parser.add_argument("--specs", nargs="+", help="schemes to measure (where the topic takes any)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU (default: %(default)s)")
    parser.add_argument("--out", default="", help="a CSV file to write, with the conditions")
    options = parser.parse_args(args)
    if options.rounds < 2:
        parser.error(f"quartiles need at least 2 rounds, got {options.rounds}")
    if options.threads < 1:
        parser.error(f"torch needs at least one thread, got {options.threads}")
    if sys.argv[1:2] == ["bench"] and sys.platform == "linux" and not STEADY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "vit_rope", *sys.argv[1:]], os.environ | STEADY)
    if options.specs and options.topic == "startup":
        parser.error("startup measures no schemes; leave --specs out")
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    topic: Any = importlib.import_module(f".{options.topic}", __name__)
    try:
        given = {} if options.specs is None else {"specs": options.specs}
        found = topic.bench(rounds=options.rounds, out=options.out, **given)
    except ValueError as error:
        parser.error(str(error))
    finally:
        torch.set_num_threads(threads)
    report(found, options.out)
