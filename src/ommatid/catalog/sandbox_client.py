"""The parent's side of `sandbox.py`: starts the process that runs SQL, sends it statements, and ends it.

`Peer` is any process that talks as `sandbox.Wire` does, on its standard input; the explorer's model runs in another.
"""

import io
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ommatid.catalog.database import settings
from ommatid.errors import QueryError

WORKER = Path(__file__).with_name("sandbox.py")
START = 120.0
"""Seconds that a process may take to start and open the catalogue; generous, as the machine may be busy."""
ANSWER_TYPES = {
    "builtins": {"bytearray"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "uuid": {"UUID", "SafeUUID"},
    "pytz": {"_UTC", "_p"},
}
"""Types of values allowed in an answer, by module, besides numbers, text, bytes, lists and dicts."""
QUESTION_TYPES = ANSWER_TYPES | {"builtins": {"NoneType", "bool", "int", "float", "str", "bytes", "bytearray", "list", "tuple", "dict"}}
"""Types of values allowed in a statement and its parameters, by module."""
INHERITED = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH", "TZ")
"""Environment variables passed on because Python or an answer may need them; all others could hold secrets."""


class Late(Exception):
    """Raised when an answer is not complete in time."""


class Died(Exception):
    """Raised when the process ends before its answer is complete."""


class Peer:
    """A process that receives and sends messages on a socket. It ends with this one.

    It belongs to the process that started it, and is closed in any process forked from that one.

    Args:
        command: The command, which is followed by the descriptor of a pipe that `sandbox.end_with_parent` watches.
        arguments: Arguments after the descriptor.
        environment: Its environment variables.
        folder: Its current directory.
        log: Where its standard error goes; None: where this process's does.

    Raises:
        OSError: The operating system cannot start the process.
    """

    def __init__(
        self, command: Sequence[str], arguments: Sequence[str], environment: Mapping[str, str], folder: str, log: int | None
    ) -> None:
        with ExitStack() as cleanup:
            ours, theirs = socket.socketpair()
            cleanup.callback(ours.close)
            with theirs:
                read_end, lifeline = os.pipe()
                cleanup.callback(os.close, lifeline)
                try:
                    self._process = subprocess.Popen(
                        [*command, str(read_end), *arguments],
                        stdin=theirs.fileno(),
                        stdout=subprocess.DEVNULL,
                        stderr=log,
                        pass_fds=[read_end],
                        env=environment,
                        cwd=folder,
                    )
                finally:
                    os.close(read_end)
            cleanup.pop_all()
        self._link, self._lifeline = ours, lifeline
        _STARTED.add(self)

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended yet."""
        return self._process.poll() is None

    def send(self, message: Any, until: float | None) -> None:
        """Send a message.

        Args:
            message: A tuple of values of `QUESTION_TYPES`.
            until: Time of the monotonic clock by which it must be sent; None: no limit.

        Raises:
            QueryError: A value is of another type.
            Late: The time has passed.
            Died: The process ended.
        """
        buffer = io.BytesIO()
        QuestionPickler(buffer).dump(message)
        payload = buffer.getvalue()
        try:
            self._link.settimeout(_seconds_left(until))
            self._link.sendall(struct.pack(">Q", len(payload)) + payload)
        except TimeoutError:
            raise Late from None
        except OSError:
            raise self._death() from None

    def receive(self, most: int, until: float | None) -> tuple[list[Any], int]:
        """Receive a message.

        Args:
            most: Maximum size of the message, in bytes.
            until: Time of the monotonic clock by which it must be complete; None: no limit.

        Returns:
            The values of the message, the first of which is its kind, and its size in bytes.

        Raises:
            QueryError: The message is too large, or holds other types than `ANSWER_TYPES`.
            Late: The time has passed.
            Died: The process ended.
        """
        (length,) = struct.unpack(">Q", self._receive_bytes(8, until))
        if length > most:
            raise QueryError("its answer is larger than the agreed limit")
        return [*AnswerUnpickler(io.BytesIO(self._receive_bytes(length, until))).load()], length

    def kill(self) -> None:
        """Kill the process; a thread that waits for an answer then gets `Died`."""
        self._process.kill()

    def end(self) -> None:
        """Kill the process if it is still running, and wait until it has ended."""
        self._process.kill()
        self._process.wait()
        self._link.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def forget(self) -> None:
        """Disconnect from the process after a fork and leave it to the parent, which started it."""
        self._process.returncode = 0  # only the parent can end the process or wait for it
        self._link.close()
        os.close(self._lifeline)
        self._lifeline = -1

    def _receive_bytes(self, n: int, until: float | None) -> bytearray:
        received = bytearray(n)
        view, n_received = memoryview(received), 0
        while n_received < n:
            try:
                self._link.settimeout(_seconds_left(until))
                n_new = self._link.recv_into(view[n_received:])
            except TimeoutError:
                raise Late from None
            except OSError:
                raise self._death() from None
            if not n_new:
                raise self._death()
            n_received += n_new
        return received

    def _death(self) -> Died:
        """Exception that says how the process ended."""
        status = self._process.wait()
        return Died(signal.Signals(-status).name if status < 0 else f"exit status {status}")


class Child(Peer):
    """A process that answers one statement at a time; if an answer is not read to its end, the process must be ended.

    Raises:
        QueryError: The operating system cannot start a process.
    """

    def __init__(self) -> None:
        environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
        environment |= {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # the other pools reserve more memory than the limit allows
        command, path = [sys.executable, "-I", "-S", str(WORKER)], [*filter(None, map(os.path.abspath, sys.path))]
        try:
            super().__init__(command, path, environment, "/", subprocess.DEVNULL)
        except OSError as error:
            raise QueryError(
                f"the process that reads the catalogue cannot be started ({error.strerror}); close other programs or files, or raise the "
                "limits that `ulimit -a` shows"
            ) from None
        self.is_idle = False
        """Whether the process is waiting for a statement."""

    def open(self, file: int, path: Path, memory_mb: int, threads: int | None = None, retained_mb: int | None = None) -> None:
        """Open a catalogue in the process.

        Args:
            file: Descriptor of the catalogue's file.
            path: Path of the file.
            memory_mb: Memory limit of a statement, in MB.
            threads: Number of DuckDB's threads; None for the default of `database.settings`.
            retained_mb: Memory in MB above which the process is not used for a further statement; None: half of what one may take.

        Raises:
            QueryError: The file is not a readable catalogue; the message is DuckDB's.
        """
        until = time.monotonic() + START
        try:
            self._link.settimeout(START)
            socket.send_fds(self._link, [b"f"], [file])
            self.send((os.path.abspath(path), settings(threads), memory_mb, retained_mb), until)
            self._receive(2**20, until)
        except (Late, OSError):
            raise QueryError(f"the process that reads the catalogue did not start within {START:g} s") from None
        except Died as death:
            raise QueryError(f"the process that reads the catalogue did not start ({death})") from None
        self.is_idle = True

    def ask(self, what: str, *values: Any, most: int, timeout: float | None) -> Iterator[tuple[Any, ...]]:
        """Send a statement and iterate over the messages of its answer.

        Args:
            what: Kind of answer: `ask` for rows, `batch` for the rows of several statements, `arrow` for an Arrow stream.
            values: Arguments of the method of that name of `sandbox.Reader`, except the last.
            most: Maximum size of the answer, in bytes.
            timeout: Seconds until the answer has to be complete; None: no limit.

        Yields:
            The kind of each message and its values.

        Raises:
            QueryError: The statement cannot be answered; the message is meant for its author.
            Late: The answer was not complete in time.
            Died: The process ended.
        """
        until = None if timeout is None else time.monotonic() + timeout
        self.is_idle = False
        self.send((what, *values, most), until)
        left = 2 * most + 2**20
        while True:
            (kind, *found), size = self._receive(left, until)
            left -= size
            if kind == "end":
                more, is_spent = found
                self.is_idle = not is_spent
                yield "end", more
                return
            yield kind, *found

    def forget(self) -> None:
        """Disconnect from the process after a fork and leave it to the parent, which started it."""
        self.is_idle = False
        super().forget()

    def _receive(self, most: int, until: float | None) -> tuple[list[Any], int]:
        """Receive a message; return its kind, its values and its size in bytes.

        Raises:
            QueryError: The message reports an error.
        """
        (kind, *values), length = self.receive(most, until)
        if kind == "error":
            text, *is_spent = values
            self.is_idle = is_spent == [False]
            raise QueryError(text)
        return [kind, *values], length


_STARTED: weakref.WeakSet[Peer] = weakref.WeakSet()


def _forget_all() -> None:
    for child in list(_STARTED):
        if child._lifeline >= 0:
            child.forget()


os.register_at_fork(after_in_child=_forget_all)


class QuestionPickler(pickle.Pickler):
    """Pickler that accepts only `QUESTION_TYPES`, as the process cannot import a module to unpickle any other class."""

    def persistent_id(self, value: Any) -> None:
        """Check a value; the pickler calls this for each one.

        Raises:
            QueryError: The value is of another type, or is text that is not Unicode.
        """
        kind = value if isinstance(value, type) else type(value)
        if kind.__name__ not in QUESTION_TYPES.get(kind.__module__, ()):
            raise QueryError(
                f"a parameter is or holds a {kind.__module__}.{kind.__qualname__}: expected None, a bool, number, text, bytes, date, time, "
                "Decimal or UUID, or a list or dict of these; convert NumPy's with tolist()"
            )
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise QueryError(f"{value[:40]!a} is not Unicode: it holds half of a surrogate pair, or a byte that is not UTF-8") from None


class AnswerUnpickler(pickle.Unpickler):
    """Unpickler that accepts only `ANSWER_TYPES`, as a process that runs untrusted SQL must not choose what is called here."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class named in an answer.

        Raises:
            QueryError: It is not one of `ANSWER_TYPES`.
        """
        if name not in ANSWER_TYPES.get(module, ()):
            raise QueryError(f"its answer holds a {module}.{name}, which no answer can")
        return super().find_class(module, name)


def _seconds_left(until: float | None) -> float | None:
    """Seconds until a time of the monotonic clock.

    Raises:
        Late: The time has passed.
    """
    if until is None:
        return None
    if (left := until - time.monotonic()) <= 0:
        raise Late
    return left
