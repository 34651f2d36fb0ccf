"""A lock on the folder of a run, so that two processes never write to it at the same time."""

import logging
import os
import socket
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # on Windows, where folders are not locked
    fcntl: Any = None

log = logging.getLogger(__name__)


class FolderLock:
    """The exclusive right to write to a folder, released when the process ends in any way.

    filelock, which comes with torch, uses flock: data workers inherit such a lock and keep it when
    the main process is killed. A POSIX record lock (lockf) belongs to the process only.

    Args:
        folder: the folder to lock; the lock is its file .lock, which names the holder
    """

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self.file: Any = None

    def take(self) -> None:
        """Take the lock; raises ValueError that names the holder if another process has it."""
        if fcntl is None or self.file is not None:
            return
        self.file = self.path.open("a+")
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            self.release()
            raise ValueError(
                f"{self.path.parent} is in use by {holder}: wait for it to end, or choose a different --out"
            ) from error
        except OSError as error:
            log.warning("cannot lock %s (%s): do not start a second run there", self.path.parent, error.strerror)
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def release(self) -> None:
        """Give up the lock, if this process has it."""
        if self.file is not None:
            self.file.close()
            self.file = None
