"""One ViT-S block: its speed when compiled by inductor, and the peak memory of a training step.

Shapes   tokens (BATCH, SIDE² + 1, WIDTH): SIDE x SIDE patches and a class token
"""

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
from .measure import Ratio, memory_ratios, ratios
from .model import TIMM, autocast

WIDTH, HEADS, SIDE, BATCH = 384, 6, 14, 8


def bench(specs: Sequence[str] = ("none", "axial", "mixed"), rounds: int = 15) -> list[Ratio]:
    """Compiled inference and training, and the peak memory of an eager step, against `none`."""
    specs = list(dict.fromkeys(("none", *specs)))
    results = []
    torch._dynamo.config.recompile_limit = 64  # all blocks share one code object
    for dtype in (torch.float32, torch.bfloat16):
        precision = str(dtype).removeprefix("torch.")
        blocks = {spec: compiled_block(spec) for spec in specs}
        inference = {spec: _block_inference(block, dtype) for spec, block in blocks.items()}
        results += ratios(f"compiled block, inference, {precision}", inference, rounds, at_least=0.2)
        training = {spec: _block_training(block, dtype) for spec, block in blocks.items()}
        results += ratios(f"compiled block, training, {precision}", training, rounds, at_least=0.2)
    peaks: dict[str, float] = {spec: peak_memory(_block_training(eager_block(spec), torch.float32)) for spec in specs}
    peaks |= {name: peak_memory(_timm_block_training(model)) for name, model in TIMM.items()}
    return results + memory_ratios("peak memory of a training step of a block", peaks)


class BlockWithPositions(nn.Module):
    """A ViT-S block that computes its own encoding in every call, as learned positions need."""

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.position = build(spec, Layout(WIDTH, HEADS, (SIDE, SIDE), 1))
        self.block = RopeBlock(WIDTH, HEADS, qkv_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, SIDE² + 1, WIDTH) after the block."""
        return self.block(x, self.position(grid((SIDE, SIDE)), 1, grid=[SIDE, SIDE]))


def eager_block(spec: str) -> nn.Module:
    """A block under the position scheme of a spec, with reproducible weights."""
    torch.manual_seed(0)
    return BlockWithPositions(spec)


def compiled_block(spec: str) -> Any:
    """The same block, compiled."""
    return torch.compile(eager_block(spec), fullgraph=True)


def peak_memory(run: Callable[[], object]) -> int:
    """The peak of bytes that a second call allocates on the CPU, on top of those it starts with."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    allocated, peak = 0, 0
    for _, change in changes:
        allocated += change
        peak = max(peak, allocated)
    return peak


def _random_tokens() -> Tensor:
    return torch.randn(BATCH, SIDE**2 + 1, WIDTH, generator=torch.Generator().manual_seed(0))


def _block_inference(block: nn.Module, dtype: torch.dtype) -> Callable[[], object]:
    x = _random_tokens()

    def run() -> None:
        with torch.no_grad(), autocast(dtype, x.device):
            block(x)

    return run


def _block_training(block: nn.Module, dtype: torch.dtype) -> Callable[[], object]:
    x = _random_tokens().requires_grad_()

    def run() -> None:
        block.zero_grad()
        x.grad = None
        with autocast(dtype, x.device):
            out = block(x)
        out.square().mean().backward()

    return run


def _timm_block_training(name: str) -> Callable[[], object]:
    """A training step of the first block of one of timm's models, in float32."""
    size: Any = {"img_size": SIDE * 16} if "dinov3" in name else {}
    model: Any = timm.create_model(name, depth=1, **size)
    block, x = model.blocks[0], _random_tokens()
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
