"""Growth of time and memory with the number of tokens, and of time with the number of axes.

Shapes   qkv (1, N, 3 · HEADS · HEAD_DIM) for N tokens
"""

import math
from collections.abc import Callable, Sequence

import torch

from ..attention import attend_qkv
from ..positions import Layout, build
from ..positions.coords import grid
from .block import peak_memory
from .measure import Ratio, memory_ratios, ratios

SIDES = (14, 20, 28, 40, 56, 80, 128)  # 196 to 16,384 tokens
AXES = {1: (4096,), 2: (64, 64), 3: (16, 16, 16), 4: (8, 8, 8, 8)}  # 48 channels per head divide by all
KINDS = {"attention": "encoding and attention", "encoding": "encoding", "memory": "peak memory"}
HEADS, HEAD_DIM = 6, 64


def bench(specs: Sequence[str] = ("none", "axial", "mixed"), rounds: int = 5) -> list[Ratio]:
    """Encoding, encoding with attention (batch 1, ViT-S), and peak memory, against the smallest
    grid.

    Then the encoding of 4096 tokens on 2, 3 and 4 axes, against one axis.
    """
    results = []
    for spec in specs:
        steps = {f"{side * side} tokens": _attention_run(spec, (side, side)) for side in SIDES}
        results += ratios(f"{KINDS['attention']}, {spec}", steps, rounds, at_least=0.02)
        results += memory_ratios(f"{KINDS['memory']}, {spec}", {name: peak_memory(run) for name, run in steps.items()})
        if spec != "none":
            encodings = {f"{side * side} tokens": _encoding_run(spec, (side, side)) for side in SIDES}
            results += ratios(f"{KINDS['encoding']}, {spec}", encodings, rounds, at_least=0.02)
            axes = {f"{n} axes": _encoding_run(spec, sizes, 48) for n, sizes in AXES.items()}
            results += ratios(f"encoding of 4096 tokens, {spec}", axes, rounds, at_least=0.02)
    return results


def _encoding_run(spec: str, sizes: tuple[int, ...], head_dim: int = HEAD_DIM) -> Callable[[], object]:
    position = build(spec, Layout(HEADS * head_dim, HEADS, sizes, 1))

    def run() -> None:
        with torch.no_grad():
            position(grid(sizes), grid=list(sizes))

    return run


def _attention_run(spec: str, sizes: tuple[int, ...]) -> Callable[[], object]:
    position = build(spec, Layout(HEADS * HEAD_DIM, HEADS, sizes, 1))
    qkv = torch.randn(1, math.prod(sizes), 3 * HEADS * HEAD_DIM)

    def run() -> None:
        with torch.no_grad():
            attend_qkv(qkv, HEADS, position(grid(sizes), grid=list(sizes)), overwrite=True)

    return run
