"""Errors at a terminal: one line if the message is enough, a traceback if it is not."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn


def exit_with(text: str) -> NoReturn:
    """End the process with `error: …` on stderr and status 1."""
    sys.exit(f"error: {text}")


@contextmanager
def one_line_errors(
    *kinds: type[Exception],
    report: Callable[[str], NoReturn] = exit_with,
    unless: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Report exceptions of these kinds in one line and end the process.

    Exceptions of other kinds keep their traceback. So do all of them if the environment sets
    VIT_ROPE_TRACEBACK=1, or if `unless()` is true.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe; Python must not flush again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except kinds as error:
        if unless() or os.environ.get("VIT_ROPE_TRACEBACK", "0") not in ("", "0"):
            raise
        report(message(error))


def message(error: Exception) -> str:
    """The message of an exception in one line.

    An exception of a DataLoader worker arrives as one of the same class whose text is the worker's
    traceback, so the last line is what the worker's exception said, after the name of its class.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught ") and " in DataLoader worker process " in lines[0]:
        return lines[-1].partition(": ")[2] or lines[-1]
    return lines[0]
