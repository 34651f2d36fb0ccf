"""Alternating measurements: times are divided within each round, which cancels other load."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track


class Ratio(NamedTuple):
    """What a candidate took relative to the reference of its group.

    `median`, `low` and `high` are the median and the quartiles of the ratio over `rounds` rounds.
    `took` is the median of what the candidate itself took, in `unit`: seconds ("s") or bytes ("B").
    """

    group: str
    candidate: str
    median: float
    low: float
    high: float
    rounds: int
    took: float
    unit: str = "s"


def memory_ratios(group: str, sizes: dict[str, float]) -> list[Ratio]:
    """Sizes in bytes relative to the first of them; one measurement suffices."""
    reference = next(iter(sizes.values()))
    shares = {name: size / reference for name, size in sizes.items()}
    return [Ratio(group, name, share, share, share, 1, sizes[name], "B") for name, share in shares.items()]


def ratios(
    group: str, runs: dict[str, Callable[[], object]], rounds: int, at_least: float = 0.0, paired: str = ""
) -> list[Ratio]:
    """Time runs alternately, and divide by the first of them, and by `paired` as well if it is
    given.

    One more round comes first and does not count. Each round starts with a different run. A run
    shorter than `at_least` seconds is repeated to last about that long.
    """
    names = list(runs)
    clock = _gpu_seconds if torch.cuda.is_available() else _cpu_seconds
    repeats = dict.fromkeys(names, 1)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in track(range(rounds + 1), description=f"{group:<44}", console=Console(stderr=True)):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            elapsed = clock(runs[name], repeats[name])
            if index:
                seconds[name].append(elapsed)
            elif at_least:
                warm = clock(runs[name], 1)  # the first call may include compilation and caching
                repeats[name] = max(1, round(at_least / max(warm, 1e-7)))
    results = time_ratios(group, seconds, names[0])
    if paired in names[1:]:
        results += time_ratios(f"{group}, against {paired}", seconds, paired)
    return results


def time_ratios(group: str, seconds: dict[str, list[float]], reference: str) -> list[Ratio]:
    """The times of each candidate (one per round) divided by those of the reference in the same
    round.
    """
    results = []
    for name, times in seconds.items():
        values = [a / b for a, b in zip(times, seconds[reference], strict=True)]
        low, median, high = statistics.quantiles(values, n=4)
        results.append(Ratio(group, name, median, low, high, len(values), statistics.median(times)))
    return results


def _cpu_seconds(run: Callable[[], object], repeats: int) -> float:
    """Seconds per call: CPU time of this process with one thread, wall time with more."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats


def _gpu_seconds(run: Callable[[], object], repeats: int) -> float:
    """Seconds per call between two CUDA events; the GPU is idle before the first and after the
    second.
    """
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / repeats
