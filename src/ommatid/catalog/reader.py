"""Catalog: read-only SQL over catalog.duckdb. DuckDB itself runs in processes of its own, so that no statement can harm this one."""

import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ommatid.catalog.client import Child, Died, Late
from ommatid.catalog.database import explain, open_file
from ommatid.catalog.database import memory_mb as default_memory_mb
from ommatid.errors import QueryError

if TYPE_CHECKING:
    import pandas
    import pyarrow

Parameters = dict[str, Any] | Sequence[Any] | None

READER_MB = 4096
"""Most memory that a statement may take where nothing else is said. Nothing spills: a reader writes no file."""
LEAST_MB = 64
"""A limit below this leaves too little to read a catalogue."""
ANSWER_MB = 256
"""Most memory of an answer where nothing else is said."""
LONGEST = 2**20
"""Characters of a statement, at most."""
LONGEST_TIMEOUT = 86400.0
"""Seconds."""


@dataclass(frozen=True)
class Column:
    """A column of a relation."""

    name: str
    """What SQL calls it."""
    type: str
    """DuckDB's type."""
    comment: str
    """What it means."""


@dataclass(frozen=True)
class Answer:
    """The rows of a query."""

    columns: tuple[str, ...]
    """Names, as SQL gave them: not necessarily unique."""
    types: tuple[str, ...]
    """DuckDB's type of each column."""
    rows: list[tuple[Any, ...]]
    """At most as many as asked for."""
    more: bool
    """Whether the query has rows beyond these."""

    def dicts(self) -> list[dict[str, Any]]:
        """Rows by column name."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


class Catalog:
    """A catalogue, open for reading: SELECT only, no files, no network, settings locked. Several threads may ask it at a time.

    Every statement, also one of this package, runs in a process that holds DuckDB and the catalogue and can open nothing else. It is killed
    when its time is up and cannot take more than its memory, whatever DuckDB makes of the statement; one that crashes it is an error like
    another. The process stays for the next statement, which then takes milliseconds; the next after a kill waits for a new process.

    A process that is forked from this one may ask as well, and starts processes of its own.

    A catalogue that is replaced while it is open here stays readable as it was; a new Catalog reads the new one.

    Raises:
        QueryError: from every method, in words for whoever wrote the SQL.

    >>> from pathlib import Path
    >>> from ommatid import Catalog
    >>> with Catalog(Path("data/catalog/catalog.duckdb")) as catalog:
    ...     rows = catalog.rows("SELECT latent, label FROM features WHERE ms > $least", {"least": 0.5})
    """

    def __init__(self, path: Path, memory_mb: int | None = None, answer_mb: int = ANSWER_MB, at_once: int = 2, child: Child | None = None):
        """Open it.

        Args:
            path: The file.
            memory_mb: Most memory that a statement may take; None: READER_MB, or a quarter of the machine's where that is less.
            answer_mb: Most memory that an answer may take here.
            at_once: Statements that run at a time, each in a process of its own; others wait for one of them.
            child: A process that was started ahead.
        """
        self.path = path
        self.memory_mb = default_memory_mb(READER_MB) if memory_mb is None else memory_mb
        self._most = answer_mb * 2**20
        self._at_once = at_once
        self._begin_anew()
        _OPEN.add(self)
        self._file = -1
        try:
            if self.memory_mb < LEAST_MB:
                raise QueryError(f"a memory limit of {self.memory_mb} MB: expected {LEAST_MB} or more")
            self._file = open_file(path)
            self._idle.append(self._begin(child or Child()))
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
        if hasattr(self, "_file"):  # opened, and dropped without `close`, as in a notebook
            self.close()

    def close(self) -> None:
        """Release the file and end its processes; a statement that another thread waits for is still answered."""
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)
        while self._idle:
            self._idle.pop().end()

    def ask(self, sql: str, parameters: Parameters = None, max_rows: int | None = None, timeout: float | None = None) -> Answer:
        """Answer one query with at most `max_rows` rows, within `timeout` seconds; None: all rows, and as long as it takes."""
        if max_rows is not None and max_rows < 0:
            raise QueryError(f"at most {max_rows} rows: expected 0 or more, or None")
        names: tuple[str, ...] = ()
        types: tuple[str, ...] = ()
        rows: list[tuple[Any, ...]] = []
        more = False
        for kind, *values in self._answer("ask", sql, parameters, max_rows, timeout=timeout):
            match kind:
                case "columns":
                    names, types = values
                case "rows":
                    rows += values[0]
                case _:
                    (more,) = values
        return Answer(names, types, rows, more)

    def rows(
        self, sql: str, parameters: Parameters = None, max_rows: int | None = None, timeout: float | None = None
    ) -> list[tuple[Any, ...]]:
        """The rows of one query as tuples."""
        return self.ask(sql, parameters, max_rows, timeout).rows

    def arrow(self, sql: str, parameters: Parameters = None, timeout: float | None = None) -> "pyarrow.Table":
        """The rows of one query as an Arrow table."""
        import pyarrow as pa

        (stream,) = [values[0] for kind, *values in self._answer("arrow", sql, parameters, timeout=timeout) if kind == "arrow"]
        return pa.ipc.open_stream(stream).read_all()

    def pandas(self, sql: str, parameters: Parameters = None, timeout: float | None = None) -> "pandas.DataFrame":
        """The rows of one query as a pandas frame, of the types that DuckDB gives one."""
        import duckdb

        table = self.arrow(sql, parameters, timeout)
        with duckdb.connect() as connection:
            return connection.from_arrow(table).df()

    def relations(self) -> dict[str, list[Column]]:
        """The columns of each relation, with what they mean."""
        found: dict[str, list[Column]] = {}
        for name, *column in self.rows(_RELATIONS):
            found.setdefault(name, []).append(Column(*column))
        return found

    def _begin_anew(self) -> None:
        """Have no process yet; after a fork, for those there are answer the other, whose threads may have been asking."""
        self._free = threading.BoundedSemaphore(self._at_once)
        self._idle: list[Child] = []

    def _answer(self, what: str, sql: str, *values: Any, timeout: float | None) -> Iterator[tuple[Any, ...]]:
        """The messages of the answer to one statement, while its time runs."""
        if timeout is not None and not 0 < timeout <= LONGEST_TIMEOUT:
            raise QueryError(f"a timeout of {timeout:g}: expected seconds, more than 0 and {LONGEST_TIMEOUT:.0f} at most, or None")
        if len(sql) > LONGEST:
            raise QueryError(f"the statement has {len(sql):,} characters: expected {LONGEST:,} or fewer")
        try:
            with self._lent(timeout) as (child, left):
                yield from child.ask(what, sql, *values, most=self._most, timeout=left)
        except Late:
            raise QueryError(f"stopped after {timeout:g} s; make the query narrower, or raise --timeout") from None
        except Died as death:
            raise QueryError(
                f"the process that ran it died ({death}): DuckDB cannot run this statement, or not within {self.memory_mb}MB of memory; "
                "ask in another way, or raise --memory-limit"
            ) from None

    @contextmanager
    def _lent(self, timeout: float | None) -> Iterator[tuple[Child, float | None]]:
        """A process that waits for a statement, and the time that is left after waiting for it."""
        began = time.monotonic()
        free = self._free  # after a fork there is another
        if not free.acquire(timeout=timeout):
            raise QueryError(f"others were asking for {timeout:g} s; try again, or raise --timeout")
        try:
            left = None if timeout is None else max(0.001, timeout - (time.monotonic() - began))
            child = self._take()
            try:
                yield child, left
            finally:
                self._put_back(child)
        finally:
            free.release()

    def _take(self) -> Child:
        try:
            return self._idle.pop()
        except IndexError:
            return self._begin(Child())

    def _put_back(self, child: Child) -> None:
        if child.is_idle and self._file >= 0:
            self._idle.append(child)
        else:
            child.end()

    def _begin(self, child: Child) -> Child:
        """Let it open the catalogue."""
        try:
            if self._file < 0:
                raise QueryError("it was closed here")
            child.open(self._file, self.path, self.memory_mb)
        except QueryError as error:
            child.end()
            raise QueryError(explain(self.path, str(error))) from None
        except BaseException:
            child.end()
            raise
        return child


_OPEN: weakref.WeakSet[Catalog] = weakref.WeakSet()


def _begin_all_anew() -> None:
    for catalog in list(_OPEN):
        catalog._begin_anew()


os.register_at_fork(after_in_child=_begin_all_anew)


_RELATIONS = """
    SELECT table_name, column_name, data_type, coalesce(comment, '') FROM duckdb_columns()
    WHERE database_name = 'catalogue' ORDER BY table_name, column_index
"""
