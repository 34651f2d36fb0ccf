"""Runs timed in turns and divided within each round, so that what else the machine does falls on all alike."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track


class Ratio(NamedTuple):
    """What a candidate took against the reference of its group, median and quartiles over the rounds; `took` is the
    median of what it took itself, in seconds or in bytes."""

    group: str
    candidate: str
    median: float
    low: float
    high: float
    rounds: int
    took: float
    unit: str = "s"


def once(group: str, values: dict[str, float]) -> list[Ratio]:
    """Bytes, which need no second look, against the first of them."""
    first = next(iter(values.values()))
    shares = {name: value / first for name, value in values.items()}
    return [Ratio(group, name, share, share, share, 1, values[name], "B") for name, share in shares.items()]


def ratios(
    group: str, runs: dict[str, Callable[[], object]], rounds: int, at_least: float = 0.0, paired: str = ""
) -> list[Ratio]:
    """Time every run in turns, after one that is not counted, against the first of them, and against `paired` too.

    Each round takes the runs in another order. A run shorter than `at_least` seconds is repeated.
    """
    names = list(runs)
    watch = _device_seconds if torch.cuda.is_available() else _seconds
    repeats = dict.fromkeys(names, 1)
    seen: dict[str, list[float]] = {name: [] for name in names}
    for index in track(range(rounds + 1), description=f"{group:<44}", console=Console(stderr=True)):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            spent = watch(runs[name], repeats[name])
            if index:
                seen[name].append(spent)
            elif at_least:
                again = watch(runs[name], 1)  # warm by now
                repeats[name] = max(1, round(at_least / max(again, 1e-7)))
    found = compared(group, seen, names[0])
    if paired in names[1:]:
        found += compared(f"{group}, against {paired}", seen, paired)
    return found


def compared(group: str, seen: dict[str, list[float]], reference: str) -> list[Ratio]:
    """What each candidate took in each round, against what the reference did in the same."""
    found = []
    for name, spent in seen.items():
        values = [a / b for a, b in zip(spent, seen[reference], strict=True)]
        low, median, high = statistics.quantiles(values, n=4)
        found.append(Ratio(group, name, median, low, high, len(values), statistics.median(spent)))
    return found


def _seconds(run: Callable[[], object], repeats: int) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats


def _device_seconds(run: Callable[[], object], repeats: int) -> float:
    """The same between two events on the GPU's own clock, from one moment when it has nothing to do to the next."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / repeats
