"""Training with Lightning: `vit-rope fit --config configs/digits_vit.yaml`.

Only this package imports Lightning, and only when one of these names is first used.
"""

import importlib

_HOMES = {
    "CIFAR": "data.in_memory",
    "Classification": "classification",
    "Diffusion": "diffusion",
    "Digits": "data.in_memory",
    "EMA": "ema",
    "Fade": "fade",
    "FashionMNIST": "data.in_memory",
    "ImageFolder": "data.folder",
    "OptimConfig": "optim",
    "ScheduleConfig": "optim",
    "TimmData": "data.timm",
}

__all__ = [
    "CIFAR",
    "EMA",
    "Classification",
    "Diffusion",
    "Digits",
    "Fade",
    "FashionMNIST",
    "ImageFolder",
    "OptimConfig",
    "ScheduleConfig",
    "TimmData",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
