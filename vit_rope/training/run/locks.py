"""A lock on the folder of a run, so that two processes never write to it at the same time."""

import logging
import os
import socket
from contextlib import suppress
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
    the main process is killed. A POSIX record lock (lockf) belongs to the process only. The file is
    removed with the lock; after a kill it stays and hinders nobody.

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
        while self.file is None:
            self.file = self.path.open("a+")
            self._lock()
            if not self._is_current():  # its last holder removed it after it was opened here: lock the new one
                self._close()
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def release(self) -> None:
        """Give up the lock and remove its file, if this process has it."""
        if self.file is not None:
            with suppress(OSError):  # such as a folder that is gone; removed while locked, see `take`
                if self._is_current():
                    self.path.unlink()
            self._close()

    def _lock(self) -> None:
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self.file.seek(0)
            holder = self.file.read().strip() or "another process"
            self._close()
            raise ValueError(
                f"{self.path.parent} is in use by {holder}: wait for it to end, or choose a different --out"
            ) from error
        except OSError as error:
            log.warning("cannot lock %s (%s): do not start a second run there", self.path.parent, error.strerror)

    def _is_current(self) -> bool:
        """Whether the path still names the open file."""
        try:
            return os.path.samestat(os.fstat(self.file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def _close(self) -> None:
        self.file.close()
        self.file = None
