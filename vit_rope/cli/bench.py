"""The command `vit-rope bench`: speed and memory, relative to a reference."""

import importlib
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..bench.report import show, write
from ..plots import plot_growth, plot_ratios
from .errors import one_line_errors
from .parsers import VerbParser

TOPICS = {
    "rotate": "rotating queries and keys, relative to copying them; other libraries too",
    "model": "ViT-S/16 with the schemes of --specs, and timm's own, relative to timm's plain ViT",
    "block": "a compiled ViT-S block, and the peak memory of an eager one, relative to none",
    "tables": "computing the cos-sin tables, relative to a ViT-S block; timm too",
    "growth": "time and memory for growing numbers of tokens and of axes",
    "unet": "training and sampling steps of U-Nets, relative to diffusers' own",
    "data": "time of the training process that preparing images takes, relative to a training step",
    "startup": "importing the library and showing help, relative to timm and torch",
}
# glibc keeps freed pages, because page faults would dominate short runs
STEADY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


def measure(
    topic: str,
    specs: list[str] | None = None,
    against: str | None = None,
    rounds: int = 15,
    threads: int = 1,
    out: Path | None = None,
) -> None:
    """Measure speed as ratios to a reference.

    Args:
        topic: what to measure, one of the list above
        specs: schemes to measure, or "all" for those that fit the model
        against: other libraries to measure too, e.g. timm,diffusers (default: all)
        rounds: number of rounds that count
        threads: number of threads of torch on a CPU
        out: a CSV or JSON file for the ratios and the conditions; a plot is written next to it
    """
    check(topic, rounds, threads, out)
    restart()
    module: Any = importlib.import_module(f"vit_rope.bench.{topic}")
    given = {"specs": specs, "against": against and against.split(",")}
    given = {name: value for name, value in given.items() if value}
    if unknown := given.keys() - inspect.signature(module.bench).parameters.keys():
        raise ValueError(f"{topic} takes no --{min(unknown)}; leave it out")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ratios = module.bench(rounds=rounds, **given)
        show(ratios)
        if out:
            write(ratios, out)
            print(out)
            draw = plot_growth if topic == "growth" else plot_ratios
            print(draw(ratios, out.with_suffix(".png")))
    finally:
        torch.set_num_threads(threads_before)


def check(topic: str, rounds: int, threads: int, out: Path | None) -> None:
    """Raise a ValueError for options that do not make sense, before anything is measured."""
    if topic not in TOPICS:
        raise ValueError(f"there is no topic {topic!r}; choose one of {', '.join(TOPICS)}")
    if rounds < 2:
        raise ValueError(f"quartiles need at least 2 rounds, got {rounds}")
    if threads < 1:
        raise ValueError(f"torch needs at least one thread, got {threads}")
    if out and out.suffix not in (".csv", ".json"):
        raise ValueError(f"--out is a .csv or .json file, got {out}")


def restart() -> None:
    """Run this process again with settings of the allocator that only a new process reads."""
    if sys.argv[1:2] == ["bench"] and sys.platform == "linux" and not STEADY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "vit_rope", *sys.argv[1:]], os.environ | STEADY)


def main(args: Sequence[str]) -> None:
    """Run `vit-rope bench`."""
    parser = VerbParser("vit-rope bench", measure)
    topics = "\n".join(f"  {name:<10} {text}" for name, text in TOPICS.items())
    parser.description = f"{parser.description}\n\n{topics}"
    with one_line_errors(ValueError, report=parser.fail):
        parser.run(args)
