"""Files that are whole or not there, whatever happens while they are written, and folders that one run has for itself.

What is new is written beside the old, brought to the disk and only then given its name. So a power cut, a full disk or
SIGKILL leave what was there before, and a half-written file has a name that nobody looks for.
"""

import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # on Windows a folder is not locked
    fcntl: Any = None

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


class AtomicIO(TorchCheckpointIO):
    """Checkpoints by `replacing`; Lightning's own go through another folder and may be cut short on the way back."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if "://" in str(path):  # a bucket, whose uploads are whole or not there by themselves
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            with telling(path):  # a run's folder that is gone is not made again: who knows on which disk
                Path(path).parent.mkdir(exist_ok=True)
            with replacing(path) as file:
                torch.save(checkpoint, file)


class FolderLock:
    """The right to write into a folder, given up when the process ends, however it does."""

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self.file: Any = None

    def take(self) -> None:
        """Raise a ValueError that names the holder where another process has it."""
        if fcntl is None or self.file is not None:
            return
        self.file = self.path.open("a+")
        try:  # a lock of the process: unlike flock's, data workers do not inherit it and outlive us with it
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            self.release()
            raise ValueError(
                f"{self.path.parent} is being written by {holder}: wait for it to end, or choose another --out"
            ) from error
        except OSError as error:
            log.warning("%s cannot be locked (%s): let no second run write there", self.path.parent, error.strerror)
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def release(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


@contextmanager
def telling(path: str | Path) -> Iterator[None]:
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
