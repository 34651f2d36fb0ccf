"""Optimizers by timm's names, with layer decay and no weight decay where it hurts, under a warm-up and a schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class OptimConfig:
    """Which optimizer, and how fast.

    opt           any of timm's optimizers: adamw, lamb, lion, muon, sgd, ...
    lr            learning rate at the schedule's highest point
    weight_decay  for matrices; never for biases, norms and what the model's `no_weight_decay()` names
    layer_decay   each layer learns this much slower than the one above it; 1 is off
    extra         further options of the optimizer itself, such as {betas: [0.9, 0.95]}
    """

    opt: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = [str(name) for name in list_optimizers()]
        if self.opt.lower() not in known:
            near = get_close_matches(self.opt.lower(), known, n=3) or known[:8]
            raise ValueError(f"unknown optimizer {self.opt!r}; did you mean {', '.join(near)}?")
        if self.lr <= 0 or self.weight_decay < 0 or not 0 < self.layer_decay <= 1:
            raise ValueError(
                "optim wants lr > 0, weight_decay >= 0 and 0 < layer_decay <= 1, "
                f"got {self.lr}, {self.weight_decay} and {self.layer_decay}"
            )


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves from step to step.

    name    cosine, linear: fall to `min_lr` over the whole training; constant; wsd: constant, then a linear fall
    warmup  a linear rise at the start: a part of the training below 1, steps from 1 on (for runs to be prolonged)
    decay   the falling part of wsd: a part of the training below 1, steps from 1 on
    min_lr  learning rate at the end of a fall
    """

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        if min(self.warmup, self.decay, self.min_lr) < 0:
            raise ValueError(f"schedule wants warmup, decay and min_lr >= 0, got {self}")


class Schedule(LambdaLR):
    """A LambdaLR whose learning rates come from the configuration of this run, also when its step is resumed."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "base_lrs": self.base_lrs})
        for group, base, factor in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = base * factor(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """An optimizer over a timm model's parameters; resumed, it takes its state from a checkpoint, not its settings.

    Loading the state of another optimizer raises ValueError.
    """
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=config.opt,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay if config.layer_decay < 1 else None,
            **config.extra,
        )
    except TypeError as error:
        raise TypeError(f"optimizer {config.opt} with extra options {config.extra}: {error}") from error
    name = config.opt.lower()
    for group in optimizer.param_groups:
        group["opt"] = name  # into checkpoints, for the state of one optimizer means nothing to another
    settings = {"weight_decay", "lr_scale", "initial_lr", *config.extra}

    def keep_settings(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        _check_same(name, state["param_groups"][0], optimizer.param_groups[0])
        if len(state["param_groups"]) != len(optimizer.param_groups):
            return state  # torch refuses it in words of its own
        groups = [
            saved | {key: value for key, value in ours.items() if key in settings}
            for saved, ours in zip(state["param_groups"], optimizer.param_groups, strict=True)
        ]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(keep_settings)
    return optimizer


def _check_same(name: str, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise a ValueError where a saved group of parameters is another optimizer's, by its name or else its settings."""
    more, fewer = saved.keys() - ours.keys(), ours.keys() - saved.keys() - {"opt"}
    fits = not (more and fewer)  # a later version of the same knows more settings, or fewer
    other = saved.get("opt", name if fits else "another optimizer")
    if other != name:
        raise ValueError(
            f"the checkpoint has the state of {other}, not of {name}: go on with the optimizer of before, "
            "or leave out --ckpt_path to start afresh"
        )


def make_schedule(optimizer: Optimizer, config: ScheduleConfig, total: float, lr: float) -> Schedule:
    """A schedule over `total` optimizer steps (infinite for constant only) whose highest rate is `lr`."""
    curve = schedule_curve(config, total, config.min_lr / lr)
    # timm writes layer decay into the groups as lr_scale and leaves it to the schedule to apply it
    return Schedule(optimizer, [_scaled(curve, group.get("lr_scale", 1.0)) for group in optimizer.param_groups])


def schedule_curve(config: ScheduleConfig, total: float, floor: float = 0.0) -> Callable[[int], float]:
    """The schedule as a function from the step to the share of the highest learning rate, `floor` at the end."""
    if not math.isfinite(total) and (config.name != "constant" or 0 < config.warmup < 1):
        raise ValueError(f"schedule {config.name} needs to know the end: set trainer.max_epochs or trainer.max_steps")
    warmup = config.warmup if config.warmup >= 1 or not config.warmup else config.warmup * total
    fall = config.decay if config.decay >= 1 else config.decay * total
    start = total - fall if config.name == "wsd" else warmup
    if warmup > total:
        raise ValueError(f"schedule warms up for {warmup:.0f} steps, but the training has only {total:.0f}")

    def curve(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.name == "constant" or step < start:
            return 1.0
        done = min(1.0, (step - start) / max(1.0, total - start))
        left = (1 + math.cos(math.pi * done)) / 2 if config.name == "cosine" else 1 - done
        return floor + (1 - floor) * left

    return curve


def _scaled(curve: Callable[[int], float], scale: float) -> Callable[[int], float]:
    return lambda step: scale * curve(step)
