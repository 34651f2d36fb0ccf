"""What a configuration may name: the allow-list for YAML, the command line and checkpoints.

A checkpoint contains the configuration of its run, so that `validate --ckpt_path FILE` needs
nothing else. It may have been downloaded, so its parts are checked before use and its configuration
may name only the classes of `TRUSTED`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch import callbacks, loggers, strategies
from lightning.pytorch.plugins.environments import SLURMEnvironment

from ...files import one_line, shorten

CONFIG_KEYS = ("out", "seed_everything", "model", "data", "trainer", "checkpoint", "last", "ema")
TRUSTED: tuple[Any, ...] = (  # what a configuration may name, with everything inside; --import adds to it
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
UNTRUSTED = ("torchvision.transforms.v2.Lambda", "torchvision.transforms.v2._misc.Lambda")  # calls any function
# the parts of a checkpoint and their types: of every checkpoint of a run, ...
PARTS = {"state_dict": dict, "pytorch-lightning_version": str}
EVALUATED = {"callbacks": dict, "loops/validate_loop": dict, "loops/test_loop": dict}  # ... optional, to evaluate it
RESUMED = {  # ... and required to resume it
    "callbacks": dict,
    "loops/fit_loop/epoch_loop.batch_progress": dict,
    "loops/fit_loop/epoch_progress": dict,
    "optimizer_states/0/state": dict,
    "optimizer_states/0/param_groups/0": dict,
    "lr_schedulers": list,
    "epoch": int,
    "global_step": int,
}


def trusted(modules: list[str]) -> list[str]:
    """The import paths that a configuration may name, including everything under `modules`."""
    paths = list(modules)
    for entry in TRUSTED:
        if isinstance(entry, str):
            paths.append(entry)
        else:  # by its own module and by the package that exports it, such as lightning.pytorch.callbacks
            package = ".".join(entry.__module__.split(".")[:3])
            paths += [f"{entry.__module__}.{entry.__qualname__}", f"{package}.{entry.__name__}"]
    return paths + [f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)]


def guard(modules: list[str]) -> None:
    """Restrict what YAML and the command line import to `TRUSTED` and everything in `modules`."""
    set_parsing_settings(
        import_path_denylist=["*", *UNTRUSTED],
        import_path_allowlist=trusted(modules),
        instantiate_subclass_spec_in_any=False,
    )


def check_parts(content: Mapping[str, Any], path: str | Path, resumes: bool) -> None:
    """Raise ValueError for a checkpoint with a missing or malformed part, which it names."""
    evaluated = {name: kind for name, kind in EVALUATED.items() if name.split("/")[0] in content}
    for name, kind in (PARTS | (RESUMED if resumes else evaluated)).items():
        part: Any = content
        for key in name.split("/"):
            part = {str(index): child for index, child in enumerate(part)} if isinstance(part, list) else part
            part = part.get(key) if isinstance(part, dict) else None
        if not isinstance(part, kind):
            fault = "missing" if part is None else f"a {type(part).__name__}, expected {kind.__name__}"
            if resumes:
                remedy = "use a different checkpoint, or leave out --ckpt_path to start from scratch"
                raise ValueError(f"{path} cannot be resumed: its {name} is {fault}; {remedy}")
            raise ValueError(f"{path} is not the checkpoint of a run: its {name} is {fault}")


def embedded_config(checkpoint: Mapping[str, Any], path: str | Path, modules: list[str]) -> str:
    """The configuration inside a checkpoint, as YAML; it may also name the classes of `modules`.

    Raises ValueError if there is none, if it cannot be read, or if it names a forbidden class.
    """
    if "config" not in checkpoint:
        raise ValueError(f"{path} contains no configuration; give --config too")
    try:
        config = yaml.safe_load(checkpoint["config"])
    except Exception as error:
        raise ValueError(f"the configuration in {path} cannot be read: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise ValueError(f"the configuration in {path} cannot be read: expected a mapping, got {type(config).__name__}")
    for name in _class_paths(config):
        allowed = any(name == trusted_path or name.startswith(f"{trusted_path}.") for trusted_path in trusted(modules))
        if not allowed or name in UNTRUSTED:
            raise ValueError(
                f"{path} names the class {shorten([name])}, which is not allowed; --import its module if you trust it"
            )
    return yaml.safe_dump({key: value for key, value in config.items() if key in CONFIG_KEYS}, sort_keys=False)


def _class_paths(node: Any) -> Iterator[str]:
    """Every `class_path` in a configuration."""
    if isinstance(node, Mapping):
        if "class_path" in node:
            yield str(node["class_path"])
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _class_paths(child)
