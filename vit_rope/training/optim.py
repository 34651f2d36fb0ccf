"""Optimizers by timm's names, with layer-wise learning rate decay, and schedules with a warm-up."""

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
    """The optimizer and its settings.

    Args:
        opt: any of timm's optimizers: adamw, lamb, lion, muon, sgd, ...
        lr: highest learning rate of the schedule
        weight_decay: for matrices; not for biases, norms and what the model's `no_weight_decay()`
            names
        layer_decay: each layer has the learning rate of the next one times this; 1 is off
        extra: further options of the optimizer, such as {betas: [0.9, 0.95]}
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
                "optim needs lr > 0, weight_decay >= 0 and 0 < layer_decay <= 1, "
                f"got {self.lr}, {self.weight_decay} and {self.layer_decay}"
            )


@dataclass(frozen=True)
class ScheduleConfig:
    """The course of the learning rate.

    Args:
        name: cosine or linear decay to `min_lr` over the training; constant; wsd, which is constant
            and then decays linearly
        warmup: length of a linear rise at the start: a fraction of the training if below 1,
            otherwise a number of steps (for runs that may be extended)
        decay: length of the decay of wsd: a fraction of the training if below 1, otherwise a number
            of steps
        min_lr: learning rate at the end of the decay
    """

    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        if min(self.warmup, self.decay, self.min_lr) < 0:
            raise ValueError(f"schedule needs warmup, decay and min_lr >= 0, got {self}")


class Schedule(LambdaLR):
    """A LambdaLR that keeps the learning rates of this run's configuration when it is resumed.

    A checkpoint restores the step only, so that a resumed run can have a new learning rate. By hand
    because timm's schedulers are not torch's `LRScheduler`, which Lightning steps and saves, and
    torch's have no length as a fraction of the training.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step, and set the learning rates for it."""
        super().load_state_dict({**state_dict, "base_lrs": self.base_lrs})
        for group, base, factor in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = base * factor(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def make_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """An optimizer for the parameters of a timm model.

    When resumed, it loads its state from a checkpoint, but keeps the settings of `config`. Its
    `load_state_dict` raises ValueError for the state of a different optimizer.
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
        group["opt"] = name  # is saved in checkpoints: a different optimizer cannot use the state
    settings = {"weight_decay", "lr_scale", "initial_lr", *config.extra}

    def keep_settings(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        _check_same(name, state["param_groups"][0], optimizer.param_groups[0])
        if len(state["param_groups"]) != len(optimizer.param_groups):
            return state  # torch raises an error for it
        groups = [
            saved | {key: value for key, value in current.items() if key in settings}
            for saved, current in zip(state["param_groups"], optimizer.param_groups, strict=True)
        ]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(keep_settings)
    return optimizer


def _check_same(name: str, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise ValueError for a saved parameter group of a different optimizer.

    Groups that were saved without the name of the optimizer are compared by their settings.
    """
    added, removed = saved.keys() - current.keys(), current.keys() - saved.keys() - {"opt"}
    fits = not (added and removed)  # another version of the same optimizer has more settings, or fewer
    saved_name = saved.get("opt", name if fits else "a different optimizer")
    if saved_name != name:
        raise ValueError(
            f"the checkpoint has the state of {saved_name}, not of {name}: resume with the previous optimizer, "
            "or leave out --ckpt_path to start from scratch"
        )


def make_schedule(optimizer: Optimizer, config: ScheduleConfig, total: float, lr: float) -> Schedule:
    """A schedule over `total` optimizer steps with the highest learning rate `lr`.

    `total` may be infinite for a constant schedule only.
    """
    curve = schedule_curve(config, total, config.min_lr / lr)
    # timm stores layer decay in the groups as lr_scale and expects the schedule to apply it
    return Schedule(optimizer, [_scaled(curve, group.get("lr_scale", 1.0)) for group in optimizer.param_groups])


def schedule_curve(config: ScheduleConfig, total: float, floor: float = 0.0) -> Callable[[int], float]:
    """The schedule as a function from the step to a fraction of the highest learning rate.

    `floor` is the fraction at the end of the decay. Raises ValueError for a warm-up that is longer
    than the training, and for a training without an end where the schedule depends on it.
    """
    if not math.isfinite(total) and (config.name != "constant" or 0 < config.warmup < 1):
        raise ValueError(
            f"schedule {config.name} needs the length of the training: set trainer.max_epochs or trainer.max_steps"
        )
    warmup = config.warmup if config.warmup >= 1 or not config.warmup else config.warmup * total
    decay = config.decay if config.decay >= 1 else config.decay * total
    decay_start = total - decay if config.name == "wsd" else warmup
    if warmup > total:
        raise ValueError(f"schedule warms up for {warmup:.0f} steps, but the training has only {total:.0f}")

    def curve(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if config.name == "constant" or step < decay_start:
            return 1.0
        progress = min(1.0, (step - decay_start) / max(1.0, total - decay_start))
        remaining = (1 + math.cos(math.pi * progress)) / 2 if config.name == "cosine" else 1 - progress
        return floor + (1 - floor) * remaining

    return curve


def _scaled(curve: Callable[[int], float], scale: float) -> Callable[[int], float]:
    return lambda step: scale * curve(step)
