"""Checkpoints as files that came from somewhere: found by a word, read without running code, checked before use.

A checkpoint carries the configuration of its run, so that `validate --ckpt_path FILE` needs nothing else. That
configuration may name only the classes of `TRUSTED`, for a checkpoint may have been downloaded.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch import callbacks, loggers, strategies
from lightning.pytorch.plugins.environments import SLURMEnvironment

from ...files import _some, one_line

CONFIG_KEYS = ("out", "seed_everything", "model", "data", "trainer", "checkpoint", "last", "ema")
TRUSTED: tuple[Any, ...] = (  # what a configuration may name, with all that is in it; --import adds to it
    "vit_rope",
    "torchvision.transforms.v2",
    callbacks.EarlyStopping,
    callbacks.LearningRateMonitor,
    callbacks.DeviceStatsMonitor,
    callbacks.ModelSummary,
    callbacks.RichModelSummary,
    callbacks.Timer,
    loggers.CSVLogger,
    loggers.TensorBoardLogger,
    strategies.DDPStrategy,
    strategies.ModelParallelStrategy,
    SLURMEnvironment,
    torch.dtype,
)
UNTRUSTED = ("torchvision.transforms.v2.Lambda", "torchvision.transforms.v2._misc.Lambda")  # calls what it is given
PARTS = {"state_dict": dict, "pytorch-lightning_version": str}  # of every run's checkpoint
EVALUATED = {"callbacks": dict, "loops/validate_loop": dict, "loops/test_loop": dict}  # where it has them
RESUMED = {
    "callbacks": dict,
    "loops/fit_loop/epoch_loop.batch_progress": dict,
    "loops/fit_loop/epoch_progress": dict,
    "optimizer_states/0/state": dict,
    "optimizer_states/0/param_groups/0": dict,
    "lr_schedulers": list,
    "epoch": int,
    "global_step": int,
}
log = logging.getLogger(__name__)


def trusted(modules: list[str]) -> list[str]:
    """The import paths that a configuration may name, those under `modules` too."""
    paths = list(modules)
    for one in TRUSTED:
        package = [] if isinstance(one, str) else [f"{'.'.join(one.__module__.split('.')[:3])}.{one.__name__}"]
        paths += [one] if isinstance(one, str) else [f"{one.__module__}.{one.__qualname__}", *package]
    return paths + [f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)]


def guard(modules: list[str]) -> None:
    """Let YAML and command line import nothing else than what is trusted and what is under `modules`."""
    set_parsing_settings(
        import_path_denylist=["*", *UNTRUSTED],
        import_path_allowlist=trusted(modules),
        instantiate_subclass_spec_in_any=False,
    )


def check_parts(content: Mapping[str, Any], path: str | Path, resumes: bool) -> None:
    """Raise a ValueError that names the first part which a checkpoint to go on with, or to evaluate, has not."""
    evaluated = {name: kind for name, kind in EVALUATED.items() if name.split("/")[0] in content}
    for name, kind in (PARTS | (RESUMED if resumes else evaluated)).items():
        part: Any = content
        for key in name.split("/"):
            part = {str(place): one for place, one in enumerate(part)} if isinstance(part, list) else part
            part = part.get(key) if isinstance(part, dict) else None
        if not isinstance(part, kind):
            found = "missing" if part is None else f"a {type(part).__name__}, no {kind.__name__}"
            todo = "; take another one, or leave out --ckpt_path to start afresh" * resumes
            raise ValueError(
                f"{path} is no checkpoint {'to go on with' if resumes else 'of a run'}: its {name} is {found}{todo}"
            )


def embedded_config(checkpoint: Mapping[str, Any], path: str | Path, modules: list[str]) -> str:
    """The configuration inside a checkpoint, as YAML; `modules` are further ones whose classes it may name."""
    if "config" not in checkpoint:
        raise ValueError(f"{path} carries no configuration; give --config too")
    try:
        config = yaml.safe_load(checkpoint["config"])
    except Exception as error:
        raise ValueError(f"the configuration in {path} cannot be read: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise ValueError(f"the configuration in {path} cannot be read: it is a {type(config).__name__}")
    for name in _class_paths(config):
        allowed = any(name == known or name.startswith(f"{known}.") for known in trusted(modules))
        if not allowed or name in UNTRUSTED:
            raise ValueError(
                f"{path} asks for the class {_some([name])}, as no file may; --import its module if you trust it"
            )
    return yaml.safe_dump({key: value for key, value in config.items() if key in CONFIG_KEYS}, sort_keys=False)


def _class_paths(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if "class_path" in node:
            yield str(node["class_path"])
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _class_paths(child)
