"""Files that are whole or not there, whatever happens while they are written, and folders that one run has for itself.

What is new is written beside the old, brought to the disk and only then given its name. So a power cut, a full disk or
SIGKILL leave what was there before, and a half-written file has a name that nobody looks for.
"""

import logging
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

log = logging.getLogger(__name__)


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when the block ends well; OSError, in one line, where the disk refuses."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # RuntimeError: torch, after the file refused to take more
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        cause = _os_error(error)
        if cause is None:
            raise
        kept = "the one from before is as it was" if path.exists() else "nothing was there before"
        raise OSError(f"could not write {path}: {cause.strerror or cause}; {kept}") from error


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A folder to make that becomes `folder` when the block ends well; OSError, in one line, where the disk refuses."""
    beside, old = (folder.with_name(f".{folder.name}.{part}") for part in ("tmp", "old"))
    try:
        for left in (beside, old):
            shutil.rmtree(left, ignore_errors=True)
        yield beside
        if folder.exists():
            folder.rename(old)
        beside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        kept = "the one from before is as it was" if folder.exists() else "nothing was there before"
        raise OSError(f"could not write {folder}: {getattr(error, 'strerror', None) or error}; {kept}") from error


@contextmanager
def naming_os_errors(path: str | Path) -> Iterator[None]:
    """Let an OSError of the block say in one line what could not be written."""
    try:
        yield
    except OSError as error:
        raise OSError(f"could not write {path}: {error.strerror or error}") from error


def _sync_folder(folder: Path) -> None:
    """Bring a new name to the disk too, where the system lets one."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError that this one is, or came from."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


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


def one_line(error: BaseException) -> str:
    """What an error says first."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _some(keys: list[str], most: int = 4) -> str:
    names = [key if key.isprintable() and key else repr(key) for key in keys[:most]]
    return ", ".join(names) + (f" and {len(keys) - most} more" if len(keys) > most else "")
