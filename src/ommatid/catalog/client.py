"""The parent's side of `worker.py`: starts the process that runs SQL, asks it, and ends it."""

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
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ommatid.catalog.database import settings
from ommatid.errors import QueryError

WORKER = Path(__file__).with_name("worker.py")
START = 120.0
"""Seconds that a process may take to start and to open the catalogue: a busy machine is no reason to give up."""
VALUES = {
    "builtins": {"bytearray"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "uuid": {"UUID", "SafeUUID"},
    "pytz": {"_UTC", "_p"},
}
"""What an answer may be made of, besides numbers, texts, bytes, lists and dicts."""
SENT = VALUES | {"builtins": {"NoneType", "bool", "int", "float", "str", "bytes", "bytearray", "list", "tuple", "dict"}}
"""What a statement and its parameters may be made of."""
KEPT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH", "TZ")
"""Variables of the environment that Python or an answer may need; others could be secrets."""


class Late(Exception):
    """The answer did not come in time."""


class Died(Exception):
    """The process ended before its answer did."""


class Child:
    """A process that answers one statement at a time; whoever leaves an answer half read must end it.

    It belongs to the process that started it: in one that is forked from that, it is closed.

    Raises:
        QueryError: the operating system starts no process.
    """

    def __init__(self) -> None:
        try:
            self._process, self._link, self._lifeline = _start()
        except OSError as error:
            raise QueryError(
                f"the process that reads the catalogue cannot be started ({error.strerror}); close other programs or files, or raise the "
                "limits that `ulimit -a` shows"
            ) from None
        self.is_idle = False
        """Whether it waits for a statement."""
        _STARTED.add(self)

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def open(self, file: int, path: Path, memory_mb: int) -> None:
        """Have it open a catalogue.

        Args:
            file: Descriptor of the file.
            path: Where it lies.
            memory_mb: Most memory of a statement.

        Raises:
            QueryError: it is none, in DuckDB's words.
        """
        until = time.monotonic() + START
        try:
            self._link.settimeout(START)
            socket.send_fds(self._link, [b"f"], [file])
            self._send((os.path.abspath(path), settings(), memory_mb), until)
            self._receive(2**20, until)
        except (Late, OSError):
            raise QueryError(f"the process that reads the catalogue did not start within {START:g} s") from None
        except Died as death:
            raise QueryError(f"the process that reads the catalogue did not start ({death})") from None
        self.is_idle = True

    def ask(self, what: str, *values: Any, most: int, timeout: float | None) -> Iterator[tuple[Any, ...]]:
        """The messages of one answer.

        Args:
            what: `ask` or `arrow`.
            values: Of the question.
            most: Bytes of the answer.
            timeout: Seconds until it has to be complete.

        Raises:
            QueryError: the statement was not answered, in words for whoever wrote it.
            Late: it took too long.
            Died: the process ended.
        """
        until = None if timeout is None else time.monotonic() + timeout
        self.is_idle = False
        self._send((what, *values, most), until)
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

    def end(self) -> None:
        """Kill the process, if it still runs, and wait until it is gone."""
        self._process.kill()
        self._process.wait()
        self._link.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def forget(self) -> None:
        """Leave the process to the one that this process was forked from."""
        self._process.returncode = 0  # it is no child of this process, which can neither end it nor wait for it
        self.is_idle = False
        self._link.close()
        os.close(self._lifeline)
        self._lifeline = -1

    def _send(self, message: Any, until: float | None) -> None:
        buffer = io.BytesIO()
        Question(buffer).dump(message)
        payload = buffer.getvalue()
        try:
            self._link.settimeout(_left(until))
            self._link.sendall(struct.pack(">Q", len(payload)) + payload)
        except TimeoutError:
            raise Late from None
        except OSError:
            raise self._death() from None

    def _receive(self, most: int, until: float | None) -> tuple[list[Any], int]:
        """One message, and its size; an error is raised."""
        (length,) = struct.unpack(">Q", self._take(8, until))
        if length > most:
            raise QueryError("its answer is larger than any that was agreed on")
        kind, *values = Values(io.BytesIO(self._take(length, until))).load()
        if kind == "error":
            text, *is_spent = values
            self.is_idle = is_spent == [False]
            raise QueryError(text)
        return [kind, *values], length

    def _take(self, n: int, until: float | None) -> bytearray:
        taken = bytearray(n)
        view, got = memoryview(taken), 0
        while got < n:
            try:
                self._link.settimeout(_left(until))
                some = self._link.recv_into(view[got:])
            except TimeoutError:
                raise Late from None
            except OSError:
                raise self._death() from None
            if not some:
                raise self._death()
            got += some
        return taken

    def _death(self) -> Died:
        """How the process ended."""
        status = self._process.wait()
        return Died(signal.Signals(-status).name if status < 0 else f"exit status {status}")


def _start() -> tuple[subprocess.Popen[bytes], socket.socket, int]:
    """The process, our end of its socket, and the end of the pipe whose closing ends it; raises OSError."""
    with ExitStack() as undone:
        ours, theirs = socket.socketpair()
        undone.callback(ours.close)
        with theirs:
            held, lifeline = os.pipe()
            undone.callback(os.close, lifeline)
            command = [sys.executable, "-I", "-S", str(WORKER), str(held), *filter(None, map(os.path.abspath, sys.path))]
            environment = {name: os.environ[name] for name in KEPT if name in os.environ}
            environment |= {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # others reserve more than a limit grants
            nowhere = subprocess.DEVNULL
            try:
                process = subprocess.Popen(
                    command, stdin=theirs.fileno(), stdout=nowhere, stderr=nowhere, pass_fds=[held], env=environment, cwd="/"
                )
            finally:
                os.close(held)
        undone.pop_all()
        return process, ours, lifeline


_STARTED: weakref.WeakSet[Child] = weakref.WeakSet()


def _forget_all() -> None:
    for child in list(_STARTED):
        if child._lifeline >= 0:
            child.forget()


os.register_at_fork(after_in_child=_forget_all)


class Question(pickle.Pickler):
    """Pickles values and nothing else: the process opens no module to learn of another class."""

    def persistent_id(self, value: Any) -> None:
        """Look at every value on its way. Raises QueryError."""
        kind = value if isinstance(value, type) else type(value)
        if kind.__name__ not in SENT.get(kind.__module__, ()):
            raise QueryError(
                f"a parameter is or holds a {kind.__module__}.{kind.__qualname__}: expected None, a bool, number, text, bytes, date, time, "
                "Decimal or UUID, or a list or dict of these; NumPy's have tolist()"
            )
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise QueryError(f"{value[:40]!a} is not Unicode: it holds half of a surrogate pair, or a byte that is not UTF-8") from None


class Values(pickle.Unpickler):
    """Unpickles values and nothing else: a process that runs foreign SQL is not trusted to name what is called here."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of a value."""
        if name not in VALUES.get(module, ()):
            raise QueryError(f"its answer holds a {module}.{name}, which no answer can")
        return super().find_class(module, name)


def _left(until: float | None) -> float | None:
    """Seconds until then.

    Raises:
        Late: it is past.
    """
    if until is None:
        return None
    if (left := until - time.monotonic()) <= 0:
        raise Late
    return left
