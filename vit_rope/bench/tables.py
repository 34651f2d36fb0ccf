"""Computing cos-sin tables, against a ViT-S block that uses them and against timm."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingMixed

from ..models.block import RopeBlock
from ..positions import Layout, build
from ..positions.coords import grid
from .measure import Ratio, ratios

WIDTH, HEADS, DEPTH, BATCH = 384, 6, 12, 8
SIDES = (14, 24, 32, 64)


def bench(specs: Sequence[str] = ("axial", "mixed"), rounds: int = 15) -> list[Ratio]:
    """The tables of 12 layers, against one block at batch 8 and against the tables of timm."""
    results = []
    for side in SIDES:
        torch.manual_seed(0)
        layout = Layout(WIDTH, HEADS, (side, side), DEPTH)
        candidates = {f"vit_rope {spec}": _make_tables(spec, layout) for spec in specs}
        block, x = RopeBlock(WIDTH, HEADS, qkv_bias=True).eval(), torch.randn(BATCH, side * side, WIDTH)
        encoding = build("none", layout)(layout.coords())

        def run(block: Any = block, x: torch.Tensor = x, encoding: Any = encoding) -> None:
            with torch.no_grad():
                block(x, encoding)

        name = f"tables of {side} x {side}"
        results += ratios(f"{name}, a block at batch {BATCH} is 1", {"block": run} | candidates, rounds, at_least=0.02)
        timm_tables: dict[str, Any] = {"axial": RotaryEmbeddingCat(WIDTH // HEADS, in_pixels=False, temperature=100.0)}
        timm_tables["mixed"] = RotaryEmbeddingMixed(WIDTH, DEPTH, HEADS)
        for spec, rope in timm_tables.items():
            runs = {f"timm {spec}": _make_timm_tables(rope, side), f"vit_rope {spec}": _make_tables(spec, layout)}
            results += ratios(f"{name}, timm's {spec} is 1", runs, rounds, at_least=0.02)
    return results


def _make_tables(spec: str, layout: Layout) -> Callable[[], object]:
    position = build(spec, layout)

    def run() -> None:
        with torch.no_grad():
            encoding = position(grid(layout.grid), 1, grid=list(layout.grid))
            for layer in range(layout.depth):  # deferred tables are made here
                encoding.rotation(layer)

    return run


def _make_timm_tables(rope: Any, side: int) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            rope.get_embed([side, side])

    return run
