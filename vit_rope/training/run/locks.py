"""TODO training.run.locks from ['training.saving']."""

import os
import socket
from pathlib import Path
from typing import Any

from ...files import log

try:
    import fcntl
except ImportError:  # on Windows a folder is not locked
    fcntl: Any = None


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
