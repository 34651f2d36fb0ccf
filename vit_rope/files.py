"""Atomic writes, and reads of checkpoints and weights that cannot run code.

New content goes to a temporary file next to the target, is flushed to the disk and only then
renamed. A power cut, a full disk or SIGKILL therefore leaves the previous file intact, and an
unfinished file has a name that nothing reads. Needs torch and safetensors, but no Lightning.

Shapes   those of a module's own parameters and buffers
"""

import argparse
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` when the block ends without an error.

    Raises OSError with a one-line message if the disk refuses; `path` is then as it was before.
    """
    path = Path(expand_home(path))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # RuntimeError: raised by torch after a failed write
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        cause = _os_error(error)
        if cause is None:
            raise
        raise OSError(f"could not write {path}: {cause.strerror or cause}; {_kept(path)}") from error


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Give the path of a folder to create; it replaces `folder` when the block ends without an
    error.

    Raises OSError with a one-line message if the disk refuses; `folder` is then as it was before.
    """
    temporary, previous = (folder.with_name(f".{folder.name}.{part}") for part in ("tmp", "old"))
    try:
        for leftover in (temporary, previous):
            shutil.rmtree(leftover, ignore_errors=True)
        yield temporary
        if folder.exists():
            folder.rename(previous)
        temporary.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"could not write {folder}: {reason}; {_kept(folder)}") from error


@contextmanager
def naming_os_errors(path: str | Path) -> Iterator[None]:
    """Turn an OSError of the block into a one-line message that names `path`."""
    try:
        yield
    except OSError as error:
        raise OSError(f"could not write {path}: {error.strerror or error}") from error


def _kept(path: Path) -> str:
    return "the previous version is unchanged" if path.exists() else "there was no previous version"


def _sync_folder(folder: Path) -> None:
    """Flush a rename to the disk, on systems that support it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError in a chain of exceptions, or None."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def expand_home(value: Any) -> Any:
    """Paths with `~` replaced by the home directory, also all those inside lists and dictionaries.

    A shell leaves it in `--out=~/runs`, and in YAML nobody replaces it. Any text that begins with
    `~` counts as a path; other values are returned as they are.
    """
    if isinstance(value, str):
        return os.path.expanduser(value)
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(map(expand_home, value))
    if isinstance(value, dict):
        return {key: expand_home(content) for key, content in value.items()}
    return value


def find(ckpt_path: str, out: str, default: str) -> Path:
    """Resolve `--ckpt_path` to a file; raises FileNotFoundError if there is none.

    `ckpt_path` is a file, a run folder (its `default` checkpoint, "best" or "last", and the last
    one if there is no best), or the word "best" or "last" (that checkpoint of the run in `out`).
    """
    path = Path(expand_home(ckpt_path))
    if ckpt_path in ("best", "last") and not path.exists():
        path = Path(expand_home(out), "checkpoints", f"{ckpt_path}.ckpt")
    elif path.is_dir():
        names = [default] if default == "last" else [default, "last"]
        paths = [path / "checkpoints" / f"{name}.ckpt" for name in names]
        path = next((path for path in paths if path.is_file()), paths[0])
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint {path}; give the file of a checkpoint, or the folder of a run that has one"
        )
    return path


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint or safetensors file as a dictionary, on the CPU, read without running any code.

    It may hold an `argparse.Namespace`, the options of a program, as files of timm's train.py do.
    Raises FileNotFoundError, or ValueError for a file that contains code, is damaged, or holds
    anything but a dictionary with string keys.
    """
    path = expand_home(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # torch warns about the pickle protocol of files that it then refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not is_pickled(path):
            raise ValueError(
                f"{path} is not a checkpoint: neither torch.save nor safetensors wrote it; give a file of weights"
            ) from error
        message = f"{path} was not loaded: it holds more than tensors and plain values, and could run code"
        raise ValueError(message) from error
    except Exception as error:  # torch raises many kinds of exceptions on a damaged file
        raise ValueError(f"{path} is not a checkpoint or is damaged: {one_line(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(
            f"{path} is not a checkpoint: expected a dictionary with string keys, got {type(content).__name__}"
        )
    return content


def is_pickled(path: str | Path) -> bool:
    """Whether a file begins as the files of torch.save do: a zip archive or a pickle."""
    with Path(path).open("rb") as file:
        return file.read(4).startswith((b"PK\x03\x04", b"\x80"))


def check_fit(module: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Raise ValueError if a state dict does not fit a module, with all differences, or has nan.

    Differences are missing and unexpected keys, wrong shapes, and floating-point tensors in place
    of others or the reverse. `name` is what the message calls the module.
    """
    wanted = module.state_dict()
    shared = {key: state[key] for key in wanted if key in state}
    tensors = {key: value for key, value in shared.items() if isinstance(value, Tensor)}
    shapes = [
        f"{key} is {tuple(value.shape)}, not {tuple(wanted[key].shape)}"
        for key, value in tensors.items()
        if value.shape != wanted[key].shape
    ]
    floats = [key for key, value in tensors.items() if value.is_floating_point()]
    differences = {
        "wrong type": [key for key in shared if wanted[key].is_floating_point() != (key in floats)],
        "missing": [key for key in wanted if key not in state],
        "unexpected": [key for key in state if key not in wanted],
        "wrong shape": shapes,
    }
    faults = [f"{fault}: {shorten(keys)}" for fault, keys in differences.items() if keys]
    if faults:
        raise ValueError(f"the weights do not fit {name}: {'; '.join(faults)}")
    with_nan = [key for key in floats if not tensors[key].is_meta and bool(tensors[key].isnan().any())]
    if with_nan:
        raise ValueError(f"the weights for {name} contain nan in {shorten(with_nan)}; use an earlier checkpoint")


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shorten(names: Sequence[str], limit: int = 4) -> str:
    """The first `limit` names as text on one line, followed by the number of the others."""
    texts = [name if name.isprintable() and name else repr(name) for name in names[:limit]]
    return ", ".join(texts) + (f" and {len(names) - limit} more" if len(names) > limit else "")
