"""Speed as ratios, measured side by side in one process: `vit-rope bench unet --out results/unet_cost.csv`."""

import copy
import csv
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn


class Ratio(NamedTuple):
    """How long a candidate took against the reference of its group: median and quartiles over the rounds."""

    group: str
    candidate: str
    median: float
    low: float
    high: float
    rounds: int


def ratios(group: str, runs: dict[str, Callable[[], object]], rounds: int) -> list[Ratio]:
    """Time every run in turns, after one that is not counted, against the first of them.

    Each round takes the runs in another order and divides within the round, so that what else the machine does falls on
    all alike; the clock counts this process's own time where that is what the device spends (CPU), else wall time.
    """
    names = list(runs)
    cuda = torch.cuda.is_available()
    clock = time.perf_counter if cuda or torch.get_num_threads() > 1 else time.process_time
    seen: dict[str, list[float]] = {name: [] for name in names}
    for index in track(range(rounds + 1), description=f"{group:<44}", console=Console(stderr=True)):
        turn = index % len(names)
        spent = {}
        for name in names[turn:] + names[:turn]:
            if cuda:
                torch.cuda.synchronize()
            start = clock()
            runs[name]()
            if cuda:
                torch.cuda.synchronize()
            spent[name] = clock() - start
        if index:
            for name in names:
                seen[name].append(spent[name] / spent[names[0]])
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in seen.items()}
    return [Ratio(group, name, q[1], q[0], q[2], rounds) for name, q in quartiles.items()]


UNETS = {  # name: pixels, channels of the levels, which of them attend, batch
    "16 x 16, attention at 16, 8": (16, (32, 64), (True, True), 16),
    "32 x 32, attention at 16, 8": (32, (32, 64, 64), (False, True, True), 8),
    "64 x 64, attention at 16, 8": (64, (32, 64, 64, 64), (False, False, True, True), 2),
}


def bench_unet(specs: Sequence[str] = ("none", "axial", "mixed", "learned"), rounds: int = 15) -> list[Ratio]:
    """A training step and a sampling step of U-Nets with positions, against diffusers' own U-Net without."""
    from diffusers import UNet2DModel

    from .unet import add_positions

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for name, (size, channels, attends, batch) in UNETS.items():
        torch.manual_seed(0)
        stock: Any = UNet2DModel(
            sample_size=size,
            in_channels=3,
            out_channels=3,
            block_out_channels=channels,
            layers_per_block=1,
            attention_head_dim=16,
            norm_num_groups=16,
            down_block_types=tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
            up_block_types=tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        )
        unets = {"stock": stock} | {spec: add_positions(copy.deepcopy(stock), spec) for spec in specs}
        x, steps = torch.randn(batch, 3, size, size, device=device), torch.arange(batch, device=device)
        unets = {key: unet.to(device) for key, unet in unets.items()}
        training = {key: _training_step(unet, x, steps) for key, unet in unets.items()}
        found += ratios(f"training step, {name}", training, rounds)
        sampling = {key: _sampling_step(unet, x, steps) for key, unet in unets.items()}
        found += ratios(f"sampling step, {name}", sampling, rounds)
    return found


def _training_step(unet: nn.Module, x: torch.Tensor, steps: torch.Tensor) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        unet(x, steps).sample.square().mean().backward()
        optimizer.step()

    return step


def _sampling_step(unet: nn.Module, x: torch.Tensor, steps: torch.Tensor) -> Callable[[], object]:
    def step() -> None:
        with torch.no_grad():
            unet(x, steps)

    return step


def report(found: Sequence[Ratio], out: str = "") -> None:
    """Print ratios as a table and, where `out` is given, write them as CSV with the conditions of the measurement."""
    table = Table("what", "candidate", "ratio", "quartiles", title="time against the first of each group")
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
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
            "threads": torch.get_num_threads(),
            "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
            "torch": torch.__version__,
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
