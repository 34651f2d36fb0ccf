"""Training with Lightning: `python train.py fit --config configs/digits_vit.yaml`.

The only place of the library that imports Lightning, and only once one of these names is asked for.
"""

import importlib

_HOMES = {
    "Classification": "classification",
    "CIFAR": "data",
    "Diffusion": "diffusion",
    "Digits": "data",
    "FashionMNIST": "data",
    "ImageFolder": "folder",
    "EMA": "callbacks",
    "Fade": "fade",
    "OptimConfig": "optim",
    "ScheduleConfig": "optim",
    "TimmData": "timm_data",
    "main": "cli",
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
    "main",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
