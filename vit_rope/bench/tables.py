"""Making the tables of turns: against a ViT-S block that uses them, and against timm's."""

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
    """The tables of a forward pass of 12 layers against one block at batch 8, and against timm's."""
    found = []
    for side in SIDES:
        torch.manual_seed(0)
        layout = Layout(WIDTH, HEADS, (side, side), DEPTH)
        made = {f"vit_rope {spec}": _made(spec, layout) for spec in specs}
        block, x = RopeBlock(WIDTH, HEADS, qkv_bias=True).eval(), torch.randn(BATCH, side * side, WIDTH)
        encoding = build("none", layout)(layout.coords())

        def run(block: Any = block, x: torch.Tensor = x, encoding: Any = encoding) -> None:
            with torch.no_grad():
                block(x, encoding)

        name = f"tables of {side} x {side}"
        found += ratios(f"{name}, a block at batch {BATCH} is 1", {"block": run} | made, rounds, at_least=0.02)
        theirs: dict[str, Any] = {"axial": RotaryEmbeddingCat(WIDTH // HEADS, in_pixels=False, temperature=100.0)}
        theirs["mixed"] = RotaryEmbeddingMixed(WIDTH, DEPTH, HEADS)
        for spec, rope in theirs.items():
            runs = {f"timm {spec}": _timm(rope, side), f"vit_rope {spec}": _made(spec, layout)}
            found += ratios(f"{name}, timm's {spec} is 1", runs, rounds, at_least=0.02)
    return found


def _made(spec: str, layout: Layout) -> Callable[[], object]:
    position = build(spec, layout)

    def run() -> None:
        with torch.no_grad():
            position(
                grid(layout.grid), 1, grid=list(layout.grid)
            ).q.tables()  # of all layers, also where made on demand

    return run


def _timm(rope: Any, side: int) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            rope.get_embed([side, side])

    return run
