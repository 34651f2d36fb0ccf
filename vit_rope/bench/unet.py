"""Training and sampling steps of U-Nets with position schemes, against diffusers' own U-Net.

Shapes   x (B, 3, size, size), steps (B,): diffusion time steps
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .measure import Ratio, ratios

UNETS = {  # name: image size, channels of the levels, which of them have attention, batch size
    "16 x 16, attention at 16, 8": (16, (32, 64), (True, True), 16),
    "32 x 32, attention at 16, 8": (32, (32, 64, 64), (False, True, True), 8),
    "64 x 64, attention at 16, 8": (64, (32, 64, 64, 64), (False, False, True, True), 2),
}


def bench(specs: Sequence[str] = ("none", "axial", "mixed", "learned"), rounds: int = 15) -> list[Ratio]:
    """Training and sampling steps, against the unchanged U-Net of diffusers and against `none`."""
    from diffusers import UNet2DModel  # optional, and slow to import

    from ..unet.models import add_positions

    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
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
        results += ratios(f"training step, {name}", training, rounds, paired="none")
        sampling = {key: _sampling_step(unet, x, steps) for key, unet in unets.items()}
        results += ratios(f"sampling step, {name}", sampling, rounds, paired="none")
    return results


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
