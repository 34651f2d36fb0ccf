"""One ViT-S block: compiled by inductor, and the memory that a training step of it takes at its peak."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ..models.block import RopeBlock
from ..positions import Layout, build
from ..positions.coords import grid
from .measure import Ratio, once, ratios
from .model import TIMM, under

WIDTH, HEADS, SIDE, BATCH = 384, 6, 14, 8


def bench(specs: Sequence[str] = ("none", "axial", "mixed"), rounds: int = 15) -> list[Ratio]:
    """Compiled inference and training against `none`; peak memory of an eager training step against `none`."""
    specs = list(dict.fromkeys(("none", *specs)))
    found = []
    torch._dynamo.config.recompile_limit = 64  # all blocks share their code
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        blocks = {spec: compiled(spec) for spec in specs}
        inference = {spec: _inference(block, dtype) for spec, block in blocks.items()}
        found += ratios(f"compiled block, inference, {kind}", inference, rounds, at_least=0.2)
        training = {spec: _training(block, dtype) for spec, block in blocks.items()}
        found += ratios(f"compiled block, training, {kind}", training, rounds, at_least=0.2)
    peaks: dict[str, float] = {spec: peak(_training(placed(spec), torch.float32)) for spec in specs}
    peaks |= {name: peak(_timm(model)) for name, model in TIMM.items()}
    return found + once("peak memory of a training step of a block", peaks)


def placed(spec: str) -> nn.Module:
    """A block under the encoding of 14 x 14 patches and a class token, which learned positions make anew each time."""
    torch.manual_seed(0)
    position = build(spec, Layout(WIDTH, HEADS, (SIDE, SIDE), 1))

    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.position = RopeBlock(WIDTH, HEADS, qkv_bias=True), position

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x, self.position(grid((SIDE, SIDE)), 1, grid=[SIDE, SIDE]))

    return Placed()


def compiled(spec: str) -> Any:
    """The same, compiled."""
    return torch.compile(placed(spec), fullgraph=True)


def peak(run: Callable[[], object]) -> int:
    """Bytes that a second run has at once beyond those it begins with, as the allocator of the CPU counts them."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        watched.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    held, most = 0, 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def _tokens() -> Tensor:
    return torch.randn(BATCH, SIDE**2 + 1, WIDTH, generator=torch.Generator().manual_seed(0))


def _inference(block: nn.Module, dtype: torch.dtype) -> Callable[[], object]:
    x = _tokens()

    def run() -> None:
        with torch.no_grad(), under(dtype, x.device):
            block(x)

    return run


def _training(block: nn.Module, dtype: torch.dtype) -> Callable[[], object]:
    x = _tokens().requires_grad_()

    def run() -> None:
        block.zero_grad()
        x.grad = None
        with under(dtype, x.device):
            out = block(x)
        out.square().mean().backward()

    return run


def _timm(name: str) -> Callable[[], object]:
    size: Any = {"img_size": SIDE * 16} if "dinov3" in name else {}
    model: Any = timm.create_model(name, depth=1, **size)
    block, x = model.blocks[0], _tokens()
    if "dinov3" in name:
        x = torch.cat((x, x[:, :4]), dim=1)  # its register tokens
    x.requires_grad_()

    def run() -> None:
        block.zero_grad()
        x.grad = None
        table = model.rope.get_embed([SIDE, SIDE])
        table = table[0] if "mixed" in name else table
        block(x, rope=table).square().mean().backward()

    return run
