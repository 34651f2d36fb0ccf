"""How time and memory grow with the number of tokens, and time with the number of axes, with a plot of the slopes."""

import math
from collections.abc import Callable, Sequence

import torch

from ..attention import attend_qkv
from ..positions import Layout, build
from ..positions.coords import grid
from .block import peak
from .measure import Ratio, once, ratios

SIDES = (14, 20, 28, 40, 56, 80, 128)  # 196 to 16,384 tokens
AXES = {1: (4096,), 2: (64, 64), 3: (16, 16, 16), 4: (8, 8, 8, 8)}  # with heads of 48 channels, which all divide
KINDS = {"attention": "encoding and attention", "encoding": "encoding", "memory": "peak memory"}
HEADS, HEAD = 6, 64


def bench(specs: Sequence[str] = ("none", "axial", "mixed"), rounds: int = 5) -> list[Ratio]:
    """Encoding alone, encoding with attention (batch 1, ViT-S), and its memory, against the smallest grid."""
    found = []
    for spec in specs:
        steps = {f"{side * side} tokens": _attention(spec, (side, side)) for side in SIDES}
        found += ratios(f"{KINDS['attention']}, {spec}", steps, rounds, at_least=0.02)
        found += once(f"{KINDS['memory']}, {spec}", {name: peak(run) for name, run in steps.items()})
        if spec != "none":
            tables = {f"{side * side} tokens": _encoding(spec, (side, side)) for side in SIDES}
            found += ratios(f"{KINDS['encoding']}, {spec}", tables, rounds, at_least=0.02)
            axes = {f"{n} axes": _encoding(spec, sizes, 48) for n, sizes in AXES.items()}
            found += ratios(f"encoding of 4096 tokens, {spec}", axes, rounds, at_least=0.02)
    return found


def _encoding(spec: str, sizes: tuple[int, ...], head: int = HEAD) -> Callable[[], object]:
    position = build(spec, Layout(HEADS * head, HEADS, sizes, 1))

    def run() -> None:
        with torch.no_grad():
            position(grid(sizes), grid=list(sizes))

    return run


def _attention(spec: str, sizes: tuple[int, ...]) -> Callable[[], object]:
    position = build(spec, Layout(HEADS * HEAD, HEADS, sizes, 1))
    qkv = torch.randn(1, math.prod(sizes), 3 * HEADS * HEAD)

    def run() -> None:
        with torch.no_grad():
            attend_qkv(qkv, HEADS, position(grid(sizes), grid=list(sizes)), overwrite=True)

    return run
