"""The process that runs the SQL of a `Catalog`: DuckDB, and nothing else of this package.

`client.py` starts this file by its path and talks to it over standard input, which is a socket. A statement cannot reach beyond it:
- It opens nothing. Once the catalogue is open, DuckDB's access to files is off and its settings are locked; beneath that the kernel refuses
  every `open` and `socket` (RLIMIT_NOFILE) and every byte written to a file (RLIMIT_FSIZE), whatever a function of DuckDB tries.
- Its memory ends at a limit of the kernel (RLIMIT_DATA on Linux), for not every function of DuckDB asks DuckDB's own limit. macOS does not
  enforce such a limit: there a thread ends the process once its peak is above it.
- It ends with its parent: the kernel signals when the last end of a pipe that the parent holds is closed (O_ASYNC), and so reaches even
  a statement that never looks up.
Time is the parent's: it kills this process.
"""

import datetime  # noqa: F401 - DuckDB makes dates with it, and could not import it once nothing may be opened
import difflib
import fcntl
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
from itertools import pairwise
from typing import Any

if __name__ == "__main__":
    sys.path[:] = sys.argv[2:]  # the parent's: this interpreter was started without any, and quickly
    sys.modules["pandas"] = None  # type: ignore[assignment]  # DuckDB would import it to ask whether a parameter is one of its values
import _duckdb as duckdb  # what `duckdb` itself is made of; the rest of that package takes as long again to import

IS_LINUX = sys.platform == "linux"
REFUSED = {
    *("checkpoint", "force_checkpoint", "enable_profiling", "disable_profiling", "enable_logging", "disable_logging", "write_log"),
    *("truncate_duckdb_logs", "arrow_scan", "arrow_scan_dumb", "pandas_scan", "python_map_function"),
    *("query", "json_execute_serialized_sql"),
}
"""Functions with an effect beyond their rows, those that take addresses of memory, and those that hide another statement in a string.

`FROM enable_profiling(format='json', save_location='...')` makes every later statement write a file; `FROM enable_logging(storage='file')`
fails every later statement and aborts the process when it closes (DuckDB 1.5)."""
CONVERTERS = {"DECIMAL": "decimal", "UUID": "uuid", "TIME ZONE": "pytz"}
"""Modules that DuckDB imports when it makes values of these types."""
CHUNK = 256
"""Rows fetched at once."""
SLACK_MB = 64
"""Beside the limit on a query: stacks of threads, and what Python takes."""
TOLD = 2000
"""Most characters of an error's text; DuckDB's may quote a whole statement."""


class Refused(Exception):
    """SQL that is not run, in words for whoever wrote it."""


class Wire:
    """Messages on a socket: the length in eight bytes, then the pickle. The parent unpickles values only, and no classes but theirs."""

    def __init__(self, link: socket.socket) -> None:
        self.link = link

    def send(self, *message: Any) -> None:
        """Write one."""
        payload = pickle.dumps(message, protocol=5)
        self.link.sendall(struct.pack(">Q", len(payload)))
        self.link.sendall(payload)

    def receive(self) -> Any:
        """Read one; where none comes, the parent is gone, and this process ends."""
        (length,) = struct.unpack(">Q", self._take(8))
        return pickle.loads(self._take(length))

    def _take(self, n: int) -> bytearray:
        taken = bytearray()
        while len(taken) < n:
            some = self.link.recv(min(n - len(taken), 2**20))
            if not some:
                os._exit(0)
            taken += some
        return taken


class Reader:
    """A catalogue, open for reading, that can no longer open anything else."""

    def __init__(self, wire: Wire, file: int, path: str, settings: dict[str, Any], memory_mb: int) -> None:
        """Attach it to a database of its own in memory.

        Args:
            wire: Where answers go.
            file: Descriptor of the catalogue: of a file that was replaced since, the old one is read.
            path: Where it lay, for messages and where a descriptor has no path.
            settings: DuckDB's.
            memory_mb: Most memory of a query.
        """
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
        """Whether this process holds on to so much memory that another had better run the next statement."""
        return self._limits.used() > (self._memory_mb + SLACK_MB) // 2

    def ask(self, sql: str, parameters: Any, max_rows: int | None, most: int) -> None:
        """Send the columns, the rows in chunks, and whether there are more; at most `most` bytes of Python objects."""
        result = self._execute(sql, parameters)
        names, types = zip(*((column[0], str(column[1])) for column in result.description), strict=True)
        self._load_converters(" ".join(types))
        is_nested = any(kind.endswith(("]", ")")) and not kind.startswith("DECIMAL") for kind in types)
        self._wire.send("columns", names, types)
        left, taken = max_rows, 0
        while rows := result.fetchmany(CHUNK if left is None else min(CHUNK, left + 1)):
            more = left is not None and len(rows) > left
            rows = rows[:left]
            taken += sum(sys.getsizeof(row) + sum(map(weigh if is_nested else sys.getsizeof, row)) for row in rows)
            if taken > most:
                raise too_large(most)
            self._wire.send("rows", rows)
            if more:
                return self._wire.send("end", True, self.is_spent)
            left = None if left is None else left - len(rows)
        self._wire.send("end", False, self.is_spent)

    def arrow(self, sql: str, parameters: Any, most: int) -> None:
        """Send the answer as one Arrow stream of at most `most` bytes."""
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
        self._wire.send("arrow", sink.getvalue().to_pybytes())
        self._wire.send("end", False, self.is_spent)

    def explain(self, error: BaseException) -> str:
        """What DuckDB says in our words, where ours help more."""
        text = str(error)
        if isinstance(error, (MemoryError, duckdb.OutOfMemoryException)):
            return (
                f"needs more than {self._memory_mb}MB of memory; aggregate or filter more, ask for fewer rows at once, "
                "or raise --memory-limit"
            )
        if missing := re.search(r"Table with name (.+?) does not exist", text):
            return self._name_relations(missing[1])
        if isinstance(error, (duckdb.IOException, duckdb.SerializationException)) and not isinstance(error, duckdb.PermissionException):
            return f"the catalogue cannot be read: it is damaged ({text}); make it again with `dvc repro catalog`"
        return text

    def _name_relations(self, missing: str) -> str:
        rows = self._connection.execute("SELECT table_name FROM duckdb_tables() WHERE database_name = 'catalogue' ORDER BY 1").fetchall()
        names = [name for (name,) in rows]
        near = difflib.get_close_matches(missing.lower(), names, n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        return f"no relation {missing!r}; {guess}the catalogue has {', '.join(names)}"

    def _execute(self, sql: str, parameters: Any) -> duckdb.DuckDBPyConnection:
        statement = self._parse(sql)
        if parameters:
            self._load_converters("DECIMAL UUID")  # what DuckDB asks whether a parameter is
        return self._connection.execute(statement, parameters)

    def _parse(self, sql: str) -> Any:
        """The one SELECT in `sql`."""
        words = split_words(sql)
        if words[:1] == ["pragma"]:
            raise Refused("PRAGMA is refused: write DESCRIBE <relation>, SHOW TABLES or SUMMARIZE <relation>")
        if called := next((a for a, b in pairwise(words) if a in REFUSED and b == "("), None):
            raise Refused(f"{called}() is refused here")
        statements = self._connection.extract_statements(sql)
        if len(statements) != 1 and words[:1] == ["pivot"]:
            raise Refused("PIVOT must name its values here: PIVOT ... ON column IN (value, ...)")
        if len(statements) != 1:
            raise Refused(f"expected one statement, found {len(statements)}")
        if statements[0].type != duckdb.StatementType.SELECT:
            kind = statements[0].type.name
            raise Refused(f"{kind} is refused: the catalogue is read-only; ask with SELECT, FROM, DESCRIBE or SUMMARIZE")
        return statements[0]

    def _load_converters(self, types: str) -> None:
        """Import what DuckDB makes values of these types with."""
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
    """What the kernel grants this process from now on."""

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
        """MB taken since then. Where the kernel sets no limit, too many end this process."""
        used = self._taken() - self._base
        if not IS_LINUX and used >= self._memory_mb:
            os._exit(1)
        return used

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """For a block that imports modules: they may be opened, and their memory is not the statement's."""
        before = self._taken()
        for kind in (resource.RLIMIT_DATA, resource.RLIMIT_NOFILE):
            set_soft(kind, resource.getrlimit(kind)[1])
        try:
            yield
        finally:
            self._base += self._taken() - before
            self._set()

    def _set(self) -> None:
        set_soft(resource.RLIMIT_NOFILE, 0)  # of new ones: those that are open stay so
        if IS_LINUX:
            set_soft(resource.RLIMIT_DATA, (self._base + self._memory_mb) * 2**20)

    def _taken(self) -> int:
        """MB of private writable memory, what RLIMIT_DATA counts; elsewhere than on Linux the peak of resident memory."""
        if self._statm is None:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**20
        return int(os.pread(self._statm, 256, 0).split()[5]) * resource.getpagesize() // 2**20

    def _watch(self) -> None:
        """Ask from a thread what is used; a statement that lets no other thread run is judged when it ends, by `Reader.is_spent`."""

        def watch() -> None:
            while True:
                self.used()
                time.sleep(0.02)

        threading.Thread(target=watch, daemon=True).start()


def set_soft(kind: int, limit: int) -> None:
    """Set a limit that this process may lift again, or the hard one where that is lower."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def split_words(sql: str) -> list[str]:
    """The words and signs of `sql` in lower case, without comments and quotes."""
    # DuckDB's offsets count bytes, and a token's tail holds the comments that follow it
    text = sql.encode()
    tokens = duckdb.tokenize(sql)
    ends = [*(start for start, _ in tokens[1:]), len(text)]
    pieces = (text[start:end].decode(errors="replace").strip() for (start, _), end in zip(tokens, ends, strict=False))
    return [_bare(piece).lower() for piece in pieces]


def _bare(piece: str) -> str:
    """A token without the comments after it and the quotes around it."""
    if quoted := re.match(r'"((?:[^"]|"")*)"', piece):
        return quoted[1]
    return re.split(r"\s|--|/\*", piece, maxsplit=1)[0] or piece


def too_large(most: int) -> Refused:
    """What is said of an answer of more than `most` bytes."""
    return Refused(f"its answer takes more than {most // 2**20}MB; ask for fewer columns or rows, or aggregate")


def weigh(value: Any) -> int:
    """Bytes of a value and all that is in it."""
    size, rest = 0, [value]
    while rest:
        one = rest.pop()
        size += sys.getsizeof(one)
        if isinstance(one, dict):
            rest += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple)):
            rest += one
    return size


def end_with_parent(pipe: int) -> None:
    """Have the kernel end this process (SIGIO, whose default that is) when the other end of a pipe that nobody writes to is closed."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:
        os._exit(0)  # it was closed already


def serve(wire: Wire) -> None:
    """Open the catalogue that comes first, then answer one statement after the other."""
    _, (file, *_), _, _ = socket.recv_fds(wire.link, 1, 1)
    try:
        reader = Reader(wire, file, *wire.receive())
    except (Refused, duckdb.Error) as error:
        return wire.send("error", str(error))
    wire.send("open")
    while True:
        what, *values = wire.receive()
        try:
            (reader.ask if what == "ask" else reader.arrow)(*values)
        except Refused as error:
            wire.send("error", str(error), reader.is_spent)
        except Exception as error:  # the edge of the process: whatever DuckDB raises is about the statement
            wire.send("error", reader.explain(error)[:TOLD], reader.is_spent)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    end_with_parent(int(sys.argv[1]))
    serve(Wire(socket.socket(fileno=0)))
