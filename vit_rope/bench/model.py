"""What positions cost a whole ViT-S/16, in inference and in training, in float32 and under bfloat16 autocast."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from torch import nn

from ..analysis.catalogue import specs_for
from ..positions import Layout
from .measure import Ratio, ratios

PLAIN = "timm vit_small_patch16_224"
TIMM = {  # timm's rotary models of the same size
    "timm rope axial": "vit_small_patch16_rope_224",
    "timm rope mixed": "vit_small_patch16_rope_mixed_224",
    "timm dinov3": "vit_small_patch16_dinov3",
}
SIZE, BATCH = 224, 8


def bench(specs: Sequence[str] = ("none", "axial", "mixed", "learned"), rounds: int = 9) -> list[Ratio]:
    """Inference and a training step (without optimizer) against timm's plain ViT-S/16, and against `none`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE, device=device), torch.randint(1000, (BATCH,), device=device)
    if "all" in specs:
        specs = specs_for(Layout(384, 6, (SIZE // 16, SIZE // 16), 12))
    models: dict[str, Any] = {PLAIN: timm.create_model("vit_small_patch16_224")}
    for spec in dict.fromkeys(("none", *specs)):
        models[spec] = timm.create_model("vit_rope_small_patch16_224", position=spec)
    for name, model in TIMM.items():
        size: Any = {"img_size": SIZE} if "dinov3" in model else {}
        models[name] = timm.create_model(model, num_classes=1000, **size)
    models = {name: model.to(device) for name, model in models.items()}
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        inference = {name: _inference(model, images, dtype) for name, model in models.items()}
        found += ratios(f"inference, {kind}", inference, rounds, paired="none")
        steps = {name: training(model, images, labels, dtype) for name, model in models.items()}
        found += ratios(f"training step, {kind}", steps, rounds, paired="none")
    return found


def under(dtype: torch.dtype, device: torch.device) -> Any:
    """Autocast to a 16-bit type, or nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def _inference(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> Callable[[], object]:
    def run() -> None:
        model.eval()
        with torch.no_grad(), under(dtype, images.device):
            model(images)

    return run


def training(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype) -> Callable[[], object]:
    def run() -> None:
        model.train()
        with under(dtype, images.device):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        model.zero_grad()  # many models are in memory

    return run
