"""TODO cli.bench from ['bench']."""

import argparse
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

TOPICS = {
    "rotate": "rotating queries and keys, against copying them, beside other libraries",
    "model": "ViT-S/16 under the schemes that --specs names, and timm's own, against timm's plain one",
    "block": "a compiled ViT-S block, and the peak memory of an eager one, against none",
    "tables": "making the tables of turns, against a ViT-S block and timm",
    "growth": "time and memory against the number of tokens and of axes, with a plot",
    "unet": "training and sampling steps of U-Nets against diffusers' own",
    "data": "what preparing images takes the process that trains, beside a training step",
    "startup": "importing the library and showing help, against timm and torch",
}
STEADY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184"}  # pages stay: faults would drown all else


def main(args: Sequence[str] | None = None) -> None:
    """Run `vit-rope bench`."""
    topics = "\n".join(f"  {name:<10} {text}" for name, text in TOPICS.items())
    parser = argparse.ArgumentParser(
        "vit-rope bench",
        description=f"Measure speed as ratios, side by side:\n\n{topics}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("topic", choices=TOPICS, metavar="TOPIC", help=", ".join(TOPICS))
    parser.add_argument("--specs", nargs="+", help="schemes to measure, or all for those that fit the model")
    parser.add_argument(
        "--against", type=lambda names: names.split(","), help="libraries beside, e.g. timm,diffusers (default: all)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds that count (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU (default: %(default)s)")
    parser.add_argument("--out", default="", help="a CSV or JSON file to write, with the conditions, and a plot beside")
    options = parser.parse_args(args)
    if options.rounds < 2:
        parser.error(f"quartiles need at least 2 rounds, got {options.rounds}")
    if options.threads < 1:
        parser.error(f"torch needs at least one thread, got {options.threads}")
    if options.out and Path(options.out).suffix not in (".csv", ".json"):
        parser.error(f"--out is a .csv or .json file, got {options.out}")
    if sys.argv[1:2] == ["bench"] and sys.platform == "linux" and not STEADY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "vit_rope", *sys.argv[1:]], os.environ | STEADY)
    topic: Any = importlib.import_module(f"vit_rope.bench.{options.topic}")
    given = {key: getattr(options, key) for key in ("specs", "against") if getattr(options, key) is not None}
    if other := given.keys() - inspect.signature(topic.bench).parameters.keys():
        parser.error(f"{options.topic} takes no --{min(other)}; leave it out")
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        found = topic.bench(rounds=options.rounds, **given)
        show(found)
        if options.out:
            write(found, Path(options.out))
            print(options.out)
            draw = plot_growth if options.topic == "growth" else plot_ratios
            print(draw(found, Path(options.out).with_suffix(".png")))
    except ValueError as error:
        parser.error(str(error))
    finally:
        torch.set_num_threads(threads)
