"""The edge of a process, where every error becomes a single line for the user and an exit status."""

import os
import select
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from ommatid.cli.terminal import printable
from ommatid.errors import OmmatidError, StoppedError, find_lack

FAULT = 70
"""Exit status of an unexpected error: EX_SOFTWARE of sysexits.h."""
LONGEST = 300
"""Maximum number of characters printed of an unexpected error's message; the traceback has all of it."""


@contextmanager
def at_edge() -> Iterator[None]:
    """Run the block as the main program, turning every error into one line on stderr, without a traceback.

    The exit status is 1 for errors that the user can fix and for anything the machine lacks (see errors.py), 130 for Ctrl-C, and 141
    when the reader of the output has gone away (`| head`). SIGTERM unwinds the block as Ctrl-C does, so that it can clean up, and gives
    143. Any other error is a fault: its type and message are printed, its traceback is written to a file that the line names, and the
    status is 70.

    Raises:
        SystemExit: The block raised an exception.
    """
    listens = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    try:
        if listens:
            signal.signal(signal.SIGTERM, _stop)
        yield
    except (StoppedError, _Stop) as stop:
        _end(128 + signal.SIGTERM, f"stopped: {stop}")
    except OmmatidError as error:
        _end(1, f"error: {error}")
    except KeyboardInterrupt:
        _end(128 + signal.SIGINT, "interrupted")
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _has_lost_reader():
            _end_unread()
        if lack := find_lack(error):
            _end(1, f"error: {'; '.join(lack.value)} ({_describe(error)})")
        _end(FAULT, f"error: {_describe(error)}; this was not expected: {_save_traceback(error)}")
    finally:
        if listens:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Stop(BaseException):
    """Raised on SIGTERM; a BaseException, so that no `except Exception` on the way catches it."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stop("asked to end by SIGTERM")


def _end(status: int, line: str) -> None:
    with suppress(OSError):
        print(printable(line), file=sys.stderr)
    raise SystemExit(status) from None


def _end_unread() -> None:
    # the interpreter flushes both streams once more on exit, which must not fail
    devnull = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(devnull, number)
    raise SystemExit(128 + signal.SIGPIPE) from None


def _has_lost_reader() -> bool:
    """Return whether our own stdout or stderr is broken, rather than a pipe to some other process."""
    outputs = select.poll()
    for number in (1, 2):
        outputs.register(number, 0)  # errors are always reported
    return any(event & select.POLLERR for _, event in outputs.poll(0))


def _describe(error: Exception) -> str:
    """Type and first line of an error."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{name}: {line[:LONGEST]}" if line else name


def _save_traceback(error: Exception) -> str:
    """Write the traceback to a file, or to stderr if that fails, and return the words that say where it is."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="ommatid-", suffix=".traceback.txt", delete=False, encoding="utf-8") as file:
            file.write(text)
    except OSError as obstacle:
        with suppress(OSError):
            sys.stderr.write(text)
        return f"its traceback is above, as it could not be written to a file ({obstacle.strerror})"
    return f"its traceback is in {file.name}; please report it with that file"
