"""Read-only SQL over a catalogue; DuckDB runs in separate processes, so that no statement can harm this one."""

import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ommatid.catalog.database import explain, open_file
from ommatid.catalog.database import memory_mb as default_memory_mb
from ommatid.catalog.sandbox_client import Child, Died, Late
from ommatid.errors import QueryError

if TYPE_CHECKING:
    import pandas
    import pyarrow

Parameters = dict[str, Any] | Sequence[Any] | None

READER_MB = 4096
"""Default memory limit of a statement, in MB. A reader writes no files, so nothing is spilled to disk."""
LEAST_MB = 32
"""Smallest memory limit, in MB, with which a catalogue can be read."""
ANSWER_MB = 256
"""Default memory limit of an answer, in MB."""
LONGEST = 2**20
"""Maximum number of characters of a statement."""
LONGEST_TIMEOUT = 86400.0
"""Maximum timeout, in seconds."""


class Stopped(QueryError):
    """A statement was stopped before it was answered."""


@dataclass(frozen=True)
class Column:
    """A column of a relation."""

    name: str
    """Name of the column in SQL."""
    type: str
    """DuckDB type of the column."""
    comment: str
    """Meaning of the column."""


@dataclass(frozen=True)
class QueryResult:
    """The answer to a query."""

    columns: tuple[str, ...]
    """Names of the columns, not necessarily unique."""
    types: tuple[str, ...]
    """DuckDB type of each column."""
    rows: list[tuple[Any, ...]]
    """Rows, up to the requested maximum."""
    more: bool
    """Whether the query has further rows."""

    def dicts(self) -> list[dict[str, Any]]:
        """The rows as dicts, by column name."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


class Stop:
    """A switch that stops a statement which another thread runs."""

    def __init__(self) -> None:
        self.is_on = False
        """Whether the statement is to be stopped."""
        self._lock = threading.Lock()
        self._child: Child | None = None

    def __call__(self) -> None:
        """Stop the statement: the process that runs it is killed. If none runs yet, the next one that is given this switch is refused."""
        with self._lock:
            self.is_on = True
            if self._child:
                self._child.kill()

    @contextmanager
    def watch(self, child: Child) -> Iterator[None]:
        """Make the switch kill a process, until the block ends."""
        with self._lock:
            if self.is_on:
                raise Stopped("stopped before it ran")
            self._child = child
        try:
            yield
        finally:
            with self._lock:  # from here on the process may run a statement of somebody else
                self._child = None
                if self.is_on:
                    child.is_idle = False  # killed, even if the answer was complete


class Catalog:
    """A catalogue opened for reading: SELECT only, no files, no network, settings locked. Safe to use from several threads.

    Every statement runs in a separate process that holds DuckDB and the catalogue and can open nothing else. The process is killed
    when a statement exceeds its time, and cannot exceed its memory, whatever DuckDB does; a statement that crashes it raises an ordinary
    error. Otherwise the process is kept for the next statement, which then takes milliseconds; after a kill, the next statement waits
    for a new process to start.

    A process forked from this one can use the catalogue as well, and starts its own reader processes.

    If the file is replaced while it is open, this object keeps reading the old file; a new `Catalog` reads the new one.

    Raises:
        QueryError: Raised by every method for statements that cannot be answered; the message is meant for the author of the SQL.

    >>> from pathlib import Path
    >>> from ommatid import Catalog
    >>> with Catalog(Path("data/catalog/catalog.duckdb")) as catalog:
    ...     rows = catalog.rows("SELECT latent, label FROM features WHERE ms > $least", {"least": 0.5})
    """

    def __init__(
        self,
        path: Path,
        memory_mb: int | None = None,
        answer_mb: int = ANSWER_MB,
        at_once: int = 2,
        child: Child | None = None,
        niceness: int = 0,
        threads: int | None = None,
        retained_mb: int | None = None,
    ):
        """Open a catalogue.

        Args:
            path: The DuckDB file.
            memory_mb: Memory limit of a statement, in MB; None: `READER_MB` or, if less, a quarter of the machine's memory.
            answer_mb: Memory limit of an answer in this process, in MB.
            at_once: Maximum number of statements that run at the same time, each in its own process; further ones wait.
            child: Reader process that is already running; None starts one.
            niceness: How much the processes give way to others that need the processor, 0 to 19, as of `nice`.
            threads: Threads of a statement; None: one for each processor, up to four. One is fastest for many short statements at once.
            retained_mb: Memory in MB above which a process is replaced after a statement; None: half of what a statement may take.
        """
        self.path = path
        self.memory_mb = default_memory_mb(READER_MB) if memory_mb is None else memory_mb
        self._most = answer_mb * 2**20
        self._at_once = at_once
        self._niceness = niceness
        self._threads = threads
        self._retained_mb = retained_mb
        self._reset()
        _OPEN.add(self)
        self._file = -1
        try:
            if self.memory_mb < LEAST_MB:
                raise QueryError(f"a memory limit of {self.memory_mb} MB: expected {LEAST_MB} or more")
            self._file = open_file(path)
            self._idle.append(self._prepare(child or Child()))
        except BaseException:
            if child:
                child.end()
            self.close()
            raise

    def __enter__(self) -> "Catalog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_file"):  # dropped without `close`, as in a notebook
            self.close()

    def close(self) -> None:
        """Close the file and end the idle processes; statements running in other threads are still answered."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)
        while self._idle:
            self._idle.pop().end()

    def ask(
        self,
        sql: str,
        parameters: Parameters = None,
        max_rows: int | None = None,
        timeout: float | None = None,
        stop: Stop | None = None,
    ) -> QueryResult:
        """Answer a query.

        Args:
            sql: One SELECT statement, or one of DESCRIBE, SHOW and SUMMARIZE.
            parameters: Values of its parameters.
            max_rows: Maximum number of rows; None: all rows.
            timeout: Time limit in seconds; None: no limit.
            stop: Switch with which another thread can stop it.

        Returns:
            The rows, with the names and types of the columns.

        Raises:
            Stopped: It was stopped.
        """
        if max_rows is not None and max_rows < 0:
            raise QueryError(f"at most {max_rows} rows: expected 0 or more, or None")
        names: tuple[str, ...] = ()
        types: tuple[str, ...] = ()
        rows: list[tuple[Any, ...]] = []
        more = False
        for kind, *values in self._answer("ask", sql, parameters, max_rows, timeout=timeout, stop=stop):
            match kind:
                case "columns":
                    names, types = values
                case "rows":
                    rows += values[0]
                case _:
                    (more,) = values
        return QueryResult(names, types, rows, more)

    def ask_all(self, questions: Sequence[tuple[str, Parameters]], timeout: float | None = None) -> list[QueryResult]:
        """Answer several queries one after the other, which takes less time than to ask one by one.

        Args:
            questions: The statements and the values of their parameters.
            timeout: Time limit of all of them, in seconds; None: no limit.

        Returns:
            The answer to each.
        """
        given = [(sql, parameters) for sql, parameters in questions]
        (answers,) = [values[0] for kind, *values in self._answer("batch", given, timeout=timeout) if kind == "answers"]
        return [QueryResult(tuple(names), tuple(types), rows, False) for names, types, rows in answers]

    def rows(
        self, sql: str, parameters: Parameters = None, max_rows: int | None = None, timeout: float | None = None
    ) -> list[tuple[Any, ...]]:
        """Answer a query, as `ask` does, with the rows alone."""
        return self.ask(sql, parameters, max_rows, timeout).rows

    def arrow(self, sql: str, parameters: Parameters = None, timeout: float | None = None) -> "pyarrow.Table":
        """Answer a query with an Arrow table of all its rows."""
        import pyarrow as pa

        (stream,) = [values[0] for kind, *values in self._answer("arrow", sql, parameters, timeout=timeout) if kind == "arrow"]
        return pa.ipc.open_stream(stream).read_all()

    def pandas(self, sql: str, parameters: Parameters = None, timeout: float | None = None) -> "pandas.DataFrame":
        """Answer a query with a pandas frame of all its rows, with the types that DuckDB's own conversion gives."""
        import duckdb

        table = self.arrow(sql, parameters, timeout)
        with duckdb.connect() as connection:
            return connection.from_arrow(table).df()

    def relations(self) -> dict[str, list[Column]]:
        """The columns of each relation, with their types and meanings."""
        found: dict[str, list[Column]] = {}
        for name, *column in self.rows(_RELATIONS):
            found.setdefault(name, []).append(Column(*column))
        return found

    def _reset(self) -> None:
        """Start without any process; called again after a fork, as existing processes belong to the parent."""
        self._free = threading.BoundedSemaphore(self._at_once)
        self._idle: list[Child] = []

    def _answer(
        self, what: str, sql: str | list[tuple[str, Parameters]], *values: Any, timeout: float | None, stop: Stop | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """Iterate over the messages of the answer to a statement, or to several, within the time limit."""
        if timeout is not None and not 0 < timeout <= LONGEST_TIMEOUT:
            raise QueryError(f"a timeout of {timeout:g}: expected seconds, more than 0 and {LONGEST_TIMEOUT:.0f} at most, or None")
        longest = len(sql) if isinstance(sql, str) else max(len(one) for one, _ in sql)
        if longest > LONGEST:
            raise QueryError(f"the statement has {longest:,} characters: expected {LONGEST:,} or fewer")
        stop = stop or Stop()
        try:
            with self._borrow(timeout) as (child, left), stop.watch(child):
                yield from child.ask(what, sql, *values, most=self._most, timeout=left)
        except Late:
            raise QueryError(f"stopped after {timeout:g} s; make the query narrower, or raise --timeout") from None
        except Died as death:
            if stop.is_on:
                raise Stopped("stopped, as was asked") from None
            raise QueryError(
                f"the process that ran it died ({death}): DuckDB cannot run this statement, or not within {self.memory_mb}MB of memory; "
                "rewrite the query, or raise --memory-limit"
            ) from None

    @contextmanager
    def _borrow(self, timeout: float | None) -> Iterator[tuple[Child, float | None]]:
        """Provide an idle process, and the seconds left of the timeout after waiting for it."""
        began = time.monotonic()
        free = self._free  # kept, as `_reset` replaces it after a fork
        if not free.acquire(timeout=timeout):
            raise QueryError(f"other statements were running for {timeout:g} s; try again, or raise --timeout")
        try:
            left = None if timeout is None else max(0.001, timeout - (time.monotonic() - began))
            child = self._acquire()
            try:
                yield child, left
            finally:
                self._release(child)
        finally:
            free.release()

    def _acquire(self) -> Child:
        try:
            return self._idle.pop()
        except IndexError:
            return self._prepare(Child())

    def _release(self, child: Child) -> None:
        if child.is_idle and self._file >= 0:
            self._idle.append(child)
        else:
            child.end()

    def _prepare(self, child: Child) -> Child:
        """Open the catalogue in a new process."""
        try:
            if self._file < 0:
                raise QueryError("this Catalog has been closed")
            if self._niceness:  # before DuckDB's threads start, which inherit it
                os.setpriority(os.PRIO_PROCESS, child.pid, self._niceness)
            child.open(self._file, self.path, self.memory_mb, self._threads, self._retained_mb)
        except QueryError as error:
            child.end()
            raise QueryError(explain(self.path, str(error))) from None
        except BaseException:
            child.end()
            raise
        return child


_OPEN: weakref.WeakSet[Catalog] = weakref.WeakSet()


def _reset_all() -> None:
    for catalog in list(_OPEN):
        catalog._reset()


os.register_at_fork(after_in_child=_reset_all)


_RELATIONS = """
    SELECT table_name, column_name, data_type, coalesce(comment, '') FROM duckdb_columns()
    WHERE database_name = 'catalogue' ORDER BY table_name, column_index
"""
