"""The edge of a process: whatever ends it becomes one line for whoever started it, and an exit status."""

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
"""Exit status of an error that nobody expected: EX_SOFTWARE of sysexits.h."""
LONGEST = 300
"""Characters of an unexpected error's message that are printed; the traceback has all of it."""


@contextmanager
def at_edge() -> Iterator[None]:
    """Run the block as the whole of a process: every error ends it with one line on stderr, none with a traceback.

    An error that is the user's to mend, or that tells what the machine lacks (see errors.py), ends with status 1, Ctrl-C with 130, a
    reader of the output who went away (`| head`) with 141. SIGTERM ends the block as Ctrl-C does, so that what must be removed or ended
    is, with status 143. Any other error is a fault: its type and message are printed, its traceback goes to a file that the line names,
    and the status is 70.

    Raises:
        SystemExit: the block raised anything.
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
        if isinstance(error, BrokenPipeError) and _lost_its_reader():
            _end_unread()
        if lack := find_lack(error):
            _end(1, f"error: {'; '.join(lack.value)} ({_describe(error)})")
        _end(FAULT, f"error: {_describe(error)}; this was not expected: {_keep_traceback(error)}")
    finally:
        if listens:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Stop(BaseException):
    """SIGTERM has come. No `except Exception` on the way takes it for an error."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stop("asked to end by SIGTERM")


def _end(status: int, line: str) -> None:
    with suppress(OSError):
        print(printable(line), file=sys.stderr)
    raise SystemExit(status) from None


def _end_unread() -> None:
    # the interpreter flushes once more when it ends, and that must not fail
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    raise SystemExit(128 + signal.SIGPIPE) from None


def _lost_its_reader() -> bool:
    """Whether it was our output that broke, not the pipe to some other process."""
    outputs = select.poll()
    for number in (1, 2):
        outputs.register(number, 0)  # errors are always reported
    return any(event & select.POLLERR for _, event in outputs.poll(0))


def _describe(error: Exception) -> str:
    """Type and first line."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{name}: {line[:LONGEST]}" if line else name


def _keep_traceback(error: Exception) -> str:
    """Write the traceback to a file, and say where; on stderr where no file can be written."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="ommatid-", suffix=".traceback.txt", delete=False, encoding="utf-8") as file:
            file.write(text)
    except OSError as obstacle:
        with suppress(OSError):
            sys.stderr.write(text)
        return f"its traceback is above, for no file could be written ({obstacle.strerror})"
    return f"its traceback is in {file.name}; please report it with that file"
