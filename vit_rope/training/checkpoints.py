"""Checkpoints as files that came from somewhere: found by a word, read without running code, checked before use.

A checkpoint carries the configuration of its run, so that `validate --ckpt_path FILE` needs nothing else. That
configuration may name only the classes of `TRUSTED`, for a checkpoint may have been downloaded.
"""

import logging
import pickle
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch import callbacks, loggers, strategies
from lightning.pytorch.plugins.environments import SLURMEnvironment
from safetensors.torch import load_file
from torch import Tensor, nn

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


def find(ckpt_path: str, out: str, default: str) -> Path:
    """The file meant by a path, a run folder (its `default` checkpoint), or `best` or `last` (of the run in `out`)."""
    path = Path(ckpt_path)
    if ckpt_path in ("best", "last") and not path.exists():
        path = Path(out, "checkpoints", f"{ckpt_path}.ckpt")
    elif path.is_dir():
        path = path / "checkpoints" / f"{default}.ckpt"
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path} for --ckpt_path {ckpt_path}; leave it out to start afresh")
    return path


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint or safetensors file as a dictionary, on the CPU; a file that holds code is refused, unexecuted."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wonders about the pickle protocol of what is refused anyhow
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        message = f"{path} was not loaded: it holds more than tensors and plain values, and could run code"
        raise ValueError(message) from error
    except Exception as error:  # torch raises about anything on a damaged file
        raise ValueError(f"{path} is no checkpoint, or damaged: {one_line(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(content).__name__} that is no dictionary of names")
    return content


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


def check_fit(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Raise a ValueError that lists what `state` has not, has too much, or has otherwise than this module wants it."""
    wanted = module.state_dict()
    both = {key: state[key] for key in wanted if key in state}
    tensors = {key: value for key, value in both.items() if isinstance(value, Tensor)}
    shapes = [
        f"{key} is {tuple(value.shape)}, not {tuple(wanted[key].shape)}"
        for key, value in tensors.items()
        if value.shape != wanted[key].shape
    ]
    reals = [key for key, value in tensors.items() if value.is_floating_point()]
    lists = {
        "of another kind": [key for key in both if wanted[key].is_floating_point() != (key in reals)],
        "missing": [key for key in wanted if key not in state],
        "unexpected": [key for key in state if key not in wanted],
        "of another shape": shapes,
    }
    faults = [f"{what}: {_some(keys)}" for what, keys in lists.items() if keys]
    if faults:
        raise ValueError(f"the weights are those of another model than {name}: {'; '.join(faults)}")
    lost = [key for key in reals if not tensors[key].is_meta and bool(tensors[key].isnan().any())]
    if lost:
        raise ValueError(f"the weights for {name} are not numbers any more: nan in {_some(lost)}; take earlier ones")


def load_weights(model: nn.Module, path: str, name: str) -> None:
    """Start a timm model from the weights in a checkpoint of ours or timm's, or a safetensors file.

    A classifier for another number of classes is left as it is; anything else that does not fit is a ValueError.
    """
    content = read(path)
    key = next((key for key in ("state_dict_ema", "model_ema", "state_dict", "model") if key in content), None)
    state = content if key is None else content[key]
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path} has no weights: its {key} is no dictionary of names")
    for prefix in ("module.", "model."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)  # timm's custom in every file
    if convert is not None:
        try:
            state = convert(state, model)
        except Exception as error:  # timm's look into tensors that they expect to be there
            raise ValueError(f"{path} has the weights of another model than {name}: {one_line(error)}") from error
    own = model.state_dict()
    heads = _classifiers(model)
    other = [k for k in state if k in own and k.startswith(heads) and getattr(state[k], "shape", None) != own[k].shape]
    if other:
        log.info("%s has a classifier for other classes: %s starts anew", path, ", ".join(other))
        state = {**state, **{k: own[k] for k in other}}
    check_fit(model, state, name)
    model.load_state_dict(state)


def one_line(error: BaseException) -> str:
    """What an error says first."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    names = getattr(model, "default_cfg", {}).get("classifier", "head")
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _class_paths(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if "class_path" in node:
            yield str(node["class_path"])
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _class_paths(child)


def _some(keys: list[str], most: int = 4) -> str:
    names = [key if key.isprintable() and key else repr(key) for key in keys[:most]]
    return ", ".join(names) + (f" and {len(keys) - most} more" if len(keys) > most else "")
