"""The process that runs the SQL of a `Catalog`; it loads DuckDB and nothing else of this package.

`sandbox_client.py` runs this file by its path and talks to it over standard input, which is a socket. The process is a sandbox:
- No statement can open a file. Once the catalogue is open, DuckDB's access to files is off and its settings are locked; below that, the
  kernel refuses every `open` and `socket` (RLIMIT_NOFILE) and every byte written to a file (RLIMIT_FSIZE), whatever DuckDB tries.
- Its memory is limited by the kernel (RLIMIT_DATA on Linux), as not every function of DuckDB respects DuckDB's own limit. macOS does
  not enforce such a limit; there, a thread ends the process once its peak memory exceeds it.
- It ends with its parent. The kernel signals it when the parent's end of a pipe closes (O_ASYNC), which interrupts even a statement that
  never returns to Python.
Time limits are enforced by the parent, which kills this process.
"""

import datetime  # noqa: F401 - DuckDB makes dates with it, and cannot import it once no file may be opened
import difflib
import fcntl
import gc
import importlib
import os
import pickle
import re
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any

if __name__ == "__main__":
    sys.path[:] = sys.argv[2:]  # the parent's path; the interpreter is started without one, which is faster
    sys.modules["pandas"] = None  # type: ignore[assignment]  # or DuckDB would import it to check the types of parameters
import _duckdb as duckdb  # the core of `duckdb`; importing the rest of that package would take twice as long

IS_LINUX = sys.platform == "linux"
REFUSED = {
    *("checkpoint", "force_checkpoint", "enable_profiling", "disable_profiling", "enable_logging", "disable_logging", "write_log"),
    *("truncate_duckdb_logs", "arrow_scan", "arrow_scan_dumb", "pandas_scan", "python_map_function"),
    *("query", "json_execute_serialized_sql"),
}
"""Functions that have side effects, that take memory addresses, or that run another statement hidden in a string.

`FROM enable_profiling(format='json', save_location='...')` makes every later statement write a file; `FROM enable_logging(storage='file')`
makes every later statement fail and aborts the process when it closes (DuckDB 1.5)."""
CONVERTERS = {"DECIMAL": "decimal", "UUID": "uuid", "TIME ZONE": "pytz"}
"""Modules that DuckDB imports to make values of these types."""
NESTED = {dict, list, tuple}
"""Python types of values that hold others."""
LONGEST_WAITING = 2**16
"""Maximum size of the messages that wait for further ones, in bytes."""
CHUNK = 256
"""Number of rows fetched at a time."""
SLACK_MB = 192
"""Memory allowed beyond the limit of a query, in MB: stacks of threads, Python, and addresses that DuckDB's allocator keeps without using
them."""
LONGEST_KNOWN = 4096
"""Maximum number of characters of the statements that are remembered as checked."""
LONGEST_ERROR = 2000
"""Maximum number of characters of an error message; DuckDB may quote a whole statement."""


class Refused(Exception):
    """SQL that is not run; the message is meant for its author."""


class Wire:
    """Messages on a socket: the length in eight bytes, then the pickle, of which the parent (`sandbox_client.py`) accepts only values."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link
        self._waiting = bytearray()

    def send(self, *message: Any, more: bool = False) -> None:
        """Send a message. If more are to follow at once, a short one waits for them, so that the parent is woken once."""
        payload = pickle.dumps(message, protocol=5)
        self._waiting += struct.pack(">Q", len(payload))
        if more and len(self._waiting) + len(payload) <= LONGEST_WAITING:
            self._waiting += payload
        else:
            waiting, self._waiting = self._waiting, bytearray()
            self.link.sendall(waiting)
            self.link.sendall(payload)

    def receive(self) -> Any:
        """Receive a message; if the parent has gone, end this process."""
        (length,) = struct.unpack(">Q", self._receive_bytes(8))
        return pickle.loads(self._receive_bytes(length))

    def _receive_bytes(self, n: int) -> bytearray:
        received = bytearray()
        while len(received) < n:
            chunk = self.link.recv(min(n - len(received), 2**20))
            if not chunk:
                os._exit(0)
            received += chunk
        return received


class Reader:
    """A catalogue opened for reading, after which DuckDB can open nothing else."""

    def __init__(self, wire: Wire, file: int, path: str, settings: dict[str, Any], memory_mb: int, retained_mb: int | None) -> None:
        """Attach the catalogue to a new in-memory database.

        Args:
            wire: Connection to send answers on.
            file: Descriptor of the catalogue, which refers to the same file even if another has replaced it.
            path: Path of the catalogue, for messages and for systems where a descriptor has no path.
            settings: Settings of DuckDB.
            memory_mb: Memory limit of a query, in MB.
            retained_mb: Memory in MB above which the process is spent after a statement; None: half of what a statement may take.
        """
        self._retained_mb = (memory_mb + SLACK_MB) // 2 if retained_mb is None else retained_mb
        self._wire = wire
        self._memory_mb = memory_mb
        self._connection = duckdb.connect(":memory:", config={**settings, "memory_limit": f"{memory_mb}MB", "temp_directory": ""})
        place = f"/proc/self/fd/{file}" if IS_LINUX else path
        literal = "'" + place.replace("'", "''") + "'"
        self._connection.execute(f"ATTACH {literal} AS catalogue (READ_ONLY, TYPE duckdb)")
        self._connection.execute("USE catalogue")
        for setting in ("enable_progress_bar = false", "enable_external_access = false", "lock_configuration = true"):
            self._connection.execute(f"SET {setting}")
        names = {name for (name,) in self._connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()}
        if not names & {"features", "runs"}:
            raise Refused("a DuckDB database, but not a catalogue: it has neither a relation features nor runs")
        self._limits = Limits(memory_mb + SLACK_MB)

    @property
    def is_spent(self) -> bool:
        """Whether this process retains so much memory that a new one should run the next statement."""
        return self._limits.used() > self._retained_mb

    def ask(self, sql: str, parameters: Any, max_rows: int | None, most: int) -> None:
        """Send the columns of an answer, its rows in chunks, and whether there are more.

        Args:
            sql: The statement.
            parameters: Values of its parameters.
            max_rows: Maximum number of rows; None: all rows.
            most: Maximum size of the rows as Python objects, in bytes.

        Raises:
            Refused: The statement is not allowed, or the answer is too large.
        """
        result, names, types, is_nested = self._begin(sql, parameters)
        self._wire.send("columns", names, types, more=True)
        left, size = max_rows, 0
        while rows := result.fetchmany(CHUNK if left is None else min(CHUNK, left + 1)):
            more = left is not None and len(rows) > left
            rows = rows[:left]
            size += weigh_rows(rows, is_nested)
            if size > most:
                raise too_large(most)
            self._wire.send("rows", rows, more=True)
            if more:
                return self._wire.send("end", True, self.is_spent)
            left = None if left is None else left - len(rows)
        self._wire.send("end", False, self.is_spent)

    def batch(self, questions: list[tuple[str, Any]], most: int) -> None:
        """Send the answers to several statements in one message: the columns, their types and all rows of each.

        Args:
            questions: The statements and the values of their parameters.
            most: Maximum size of all rows as Python objects, in bytes.

        Raises:
            Refused: A statement is not allowed, or the answers are too large.
        """
        answers, size = [], 0
        for sql, parameters in questions:
            result, names, types, is_nested = self._begin(sql, parameters)
            rows: list[tuple[Any, ...]] = []
            is_all = False
            while not is_all:
                chunk = result.fetchmany(CHUNK)
                size += weigh_rows(chunk, is_nested)
                if size > most:
                    raise too_large(most)
                rows += chunk
                is_all = len(chunk) < CHUNK
            answers.append((names, types, rows))
        self._wire.send("answers", answers, more=True)
        self._wire.send("end", False, self.is_spent)

    def arrow(self, sql: str, parameters: Any, most: int) -> None:
        """Send an answer as a single Arrow stream.

        Args:
            sql: The statement.
            parameters: Values of its parameters.
            most: Maximum size of the stream, in bytes.

        Raises:
            Refused: The statement is not allowed, or the answer is too large.
        """
        with self._limits.lifted():
            import pyarrow as pa

        result = self._execute(sql, parameters)
        sink = pa.BufferOutputStream()
        batches = result.to_arrow_reader(CHUNK * 64)
        with pa.ipc.new_stream(sink, batches.schema) as stream:
            for batch in batches:
                stream.write_batch(batch)
                if sink.tell() > most:
                    raise too_large(most)
        self._wire.send("arrow", sink.getvalue().to_pybytes(), more=True)
        self._wire.send("end", False, self.is_spent)

    def explain(self, error: BaseException) -> str:
        """Message for an error: DuckDB's, or a more helpful one if there is one."""
        text = str(error)
        if isinstance(error, (MemoryError, duckdb.OutOfMemoryException)):
            return (
                f"needs more than {self._memory_mb}MB of memory; aggregate or filter more, ask for fewer rows at once, "
                "or raise --memory-limit"
            )
        if missing := re.search(r"Table with name (.+?) does not exist", text):
            return self._name_relations(missing[1])
        if isinstance(error, (duckdb.IOException, duckdb.SerializationException)) and not isinstance(error, duckdb.PermissionException):
            return f"the catalogue cannot be read, as it is damaged ({text}); build it again with `dvc repro catalog`"
        return text

    def _name_relations(self, missing: str) -> str:
        rows = self._connection.execute("SELECT table_name FROM duckdb_tables() WHERE database_name = 'catalogue' ORDER BY 1").fetchall()
        names = [name for (name,) in rows]
        near = difflib.get_close_matches(missing.lower(), names, n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        return f"no relation {missing!r}; {guess}the catalogue has {', '.join(names)}"

    def _begin(self, sql: str, parameters: Any) -> tuple[Any, tuple[str, ...], tuple[str, ...], bool]:
        """Execute a statement; return its result, the names and types of its columns, and whether any of them is nested."""
        result = self._execute(sql, parameters)
        names, types = zip(*((column[0], str(column[1])) for column in result.description), strict=True)
        self._load_converters(" ".join(types))
        return result, names, types, any(kind.endswith(("]", ")")) and not kind.startswith("DECIMAL") for kind in types)

    def _execute(self, sql: str, parameters: Any) -> duckdb.DuckDBPyConnection:
        statement = self._parse(sql)
        if parameters:
            self._load_converters("DECIMAL UUID")  # DuckDB checks every parameter for these types
        return self._connection.execute(statement, parameters)

    def _parse(self, sql: str) -> Any:
        """Parse the single SELECT statement in `sql`.

        Raises:
            Refused: It holds anything else, or calls one of the `REFUSED` functions.
        """
        first = (check_again if len(sql) <= LONGEST_KNOWN else check_words)(sql)
        statements = self._connection.extract_statements(sql)
        if len(statements) != 1 and first == "pivot":
            raise Refused("PIVOT must name its values here: PIVOT ... ON column IN (value, ...)")
        if len(statements) != 1:
            raise Refused(f"expected one statement, found {len(statements)}")
        if statements[0].type != duckdb.StatementType.SELECT:
            kind = statements[0].type.name
            raise Refused(f"{kind} is refused: the catalogue is read-only; ask with SELECT, FROM, DESCRIBE or SUMMARIZE")
        return statements[0]

    def _load_converters(self, types: str) -> None:
        """Import the modules that DuckDB needs to make values of these types."""
        wanted = [module for word, module in CONVERTERS.items() if word in types and module not in sys.modules]
        if not wanted:
            return
        with self._limits.lifted():
            for module in wanted:
                importlib.import_module(module)
            if "pytz" in wanted:
                zone = self._connection.cursor().execute("SELECT current_setting('TimeZone')").fetchall()[0][0]
                sys.modules["pytz"].timezone(zone)


class Limits:
    """Limits that the kernel sets on this process from now on."""

    def __init__(self, memory_mb: int) -> None:
        self._memory_mb = memory_mb
        self._statm = os.open("/proc/self/statm", os.O_RDONLY) if IS_LINUX else None
        self._base = self._taken()
        set_soft(resource.RLIMIT_CORE, 0)
        set_soft(resource.RLIMIT_FSIZE, 0)
        self._set()
        if not IS_LINUX:
            self._watch()

    def used(self) -> int:
        """Memory taken since the limits were set, in MB; where the kernel enforces no limit, end the process if it is exceeded."""
        used = self._taken() - self._base
        if not IS_LINUX and used >= self._memory_mb:
            os._exit(1)
        return used

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Lift the limits inside a block that imports modules, and don't count the memory that it takes."""
        before = self._taken()
        for kind in (resource.RLIMIT_DATA, resource.RLIMIT_NOFILE):
            set_soft(kind, resource.getrlimit(kind)[1])
        try:
            yield
        finally:
            self._base += self._taken() - before
            self._set()

    def _set(self) -> None:
        set_soft(resource.RLIMIT_NOFILE, 0)  # no new files; those already open stay open
        if IS_LINUX:
            set_soft(resource.RLIMIT_DATA, (self._base + self._memory_mb) * 2**20)

    def _taken(self) -> int:
        """Private writable memory in MB, which RLIMIT_DATA counts; on systems other than Linux, the peak resident memory."""
        if self._statm is None:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20
        return int(os.pread(self._statm, 256, 0).split()[5]) * resource.getpagesize() // 2**20

    def _watch(self) -> None:
        """Check the memory from a thread; if a statement never releases the GIL, `Reader.is_spent` checks it afterwards."""

        def watch() -> None:
            while True:
                self.used()
                time.sleep(0.02)

        threading.Thread(target=watch, daemon=True).start()


def set_soft(kind: int, limit: int) -> None:
    """Set a soft limit, which this process can raise again, or the hard limit if that is lower."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def check_words(sql: str) -> str:
    """Return the first word of a statement in lower case.

    Raises:
        Refused: It is a PRAGMA, or calls one of the `REFUSED` functions.
    """
    words = split_words(sql)
    if words[:1] == ["pragma"]:
        raise Refused("PRAGMA is refused: write DESCRIBE <relation>, SHOW TABLES or SUMMARIZE <relation>")
    if called := next((a for a, b in pairwise(words) if a in REFUSED and b == "("), None):
        raise Refused(f"{called}() is refused here")
    return words[0] if words else ""


check_again = lru_cache(64)(check_words)
"""`check_words` for the short statements that pages ask again and again."""


def split_words(sql: str) -> list[str]:
    """Split SQL into its words and symbols, in lower case and without comments and quotes."""
    # DuckDB's offsets count bytes, and the text up to the next token includes any comments
    text = sql.encode()
    tokens = duckdb.tokenize(sql)
    ends = [*(start for start, _ in tokens[1:]), len(text)]
    pieces = (text[start:end].decode(errors="replace").strip() for (start, _), end in zip(tokens, ends, strict=False))
    return [_bare(piece).lower() for piece in pieces]


def _bare(piece: str) -> str:
    """Strip a token of trailing comments and surrounding quotes."""
    if quoted := re.match(r'"((?:[^"]|"")*)"', piece):
        return quoted[1]
    return re.split(r"\s|--|/\*", piece, maxsplit=1)[0] or piece


def too_large(most: int) -> Refused:
    """Make the error for an answer of more than `most` bytes."""
    return Refused(f"its answer takes more than {most // 2**20}MB; ask for fewer columns or rows, or aggregate")


def weigh_rows(rows: list[tuple[Any, ...]], is_nested: bool) -> int:
    """Size of rows in bytes, as Python objects."""
    return sum(sys.getsizeof(row) + sum(map(weigh if is_nested else sys.getsizeof, row)) for row in rows)


def weigh(value: Any) -> int:
    """Size of a value in bytes, including everything nested in it."""
    size = sys.getsizeof(value)
    if isinstance(value, dict):
        return size + sum(map(weigh, value.keys())) + sum(map(weigh, value.values()))
    if isinstance(value, (list, tuple)):
        return size + sum(map(sys.getsizeof if NESTED.isdisjoint(map(type, value)) else weigh, value))
    return size


def end_with_parent(pipe: int) -> None:
    """Let the kernel end this process, by the default action of SIGIO, when the parent's end of a pipe is closed."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:
        os._exit(0)  # the parent has closed it already


def collect_seldom() -> None:
    """Make Python look for circular garbage less often, and not among what exists now: answers are large, but hold no circles."""
    gc.freeze()
    gc.set_threshold(20_000, 50, 1000)


def serve(wire: Wire) -> None:
    """Open the catalogue named in the first message, then answer one statement after another."""
    _, (file, *_), _, _ = socket.recv_fds(wire.link, 1, 1)
    try:
        reader = Reader(wire, file, *wire.receive())
    except (Refused, duckdb.Error) as error:
        return wire.send("error", str(error))
    wire.send("open")
    collect_seldom()
    while True:
        what, *values = wire.receive()
        try:
            {"ask": reader.ask, "batch": reader.batch, "arrow": reader.arrow}[what](*values)
        except Refused as error:
            wire.send("error", str(error), reader.is_spent)
        except Exception as error:  # the edge of the process: DuckDB raises many types, all of them about the statement
            wire.send("error", reader.explain(error)[:LONGEST_ERROR], reader.is_spent)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    end_with_parent(int(sys.argv[1]))
    serve(Wire(socket.socket(fileno=0)))
