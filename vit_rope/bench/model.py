"""Inference and training of ViT-S/16 with position schemes, in float32 and bfloat16 autocast.

Shapes   images (BATCH, 3, SIZE, SIZE), labels (BATCH,)
"""

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
    """Inference and a training step, without optimizer, against timm's ViT-S/16 and against `none`.

    "all" among the specs stands for every registered scheme that the model supports.
    """
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
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        precision = str(dtype).removeprefix("torch.")
        inference = {name: model_inference(model, images, dtype) for name, model in models.items()}
        results += ratios(f"inference, {precision}", inference, rounds, paired="none")
        steps = {name: training_step(model, images, labels, dtype) for name, model in models.items()}
        results += ratios(f"training step, {precision}", steps, rounds, paired="none")
    return results


def autocast(dtype: torch.dtype, device: torch.device) -> Any:
    """A context that autocasts to a 16-bit type, and does nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def model_inference(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """A function that runs the model on the images without gradients."""

    def run() -> None:
        model.eval()
        with torch.no_grad(), autocast(dtype, images.device):
            model(images)

    return run


def training_step(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
) -> Callable[[], object]:
    """A function that runs one forward and backward pass of a classifier."""

    def run() -> None:
        model.train()
        with autocast(dtype, images.device):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        model.zero_grad()  # frees the gradients, because many models are in memory

    return run
