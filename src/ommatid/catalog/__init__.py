"""Catalog: read-only SQL over catalog.duckdb. Importing it needs duckdb only."""

import difflib
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from ommatid.catalog.settings import SEALED, memory_limit, quote
from ommatid.errors import QueryError

if TYPE_CHECKING:
    import pandas
    import pyarrow

Parameters = dict[str, Any] | Sequence[Any] | None

READER_MB = 4096
"""Most memory that a query may take. Nothing spills: a reader writes no file."""

REFUSED = {"query", "json_execute_serialized_sql", "enable_logging", "disable_logging", "truncate_duckdb_logs"}
"""Functions with an effect beyond their rows, and those that hide one in a string: on a locked connection
`FROM enable_logging(storage='file')` fails every later statement and aborts the process when it closes (duckdb 1.5)."""


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
    """A catalogue, open for reading: one SELECT at a time, no files, no network, settings locked. Not for several threads at once.

    A catalogue that is replaced while it is open here stays readable as it was; a new Catalog reads the new one.

    Raises:
        QueryError: from every method, in words for whoever wrote the SQL.
    """

    def __init__(self, path: Path):
        self.path = path
        self._connection = _connect(path)

    def __enter__(self) -> "Catalog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file."""
        self._connection.close()

    def ask(self, sql: str, parameters: Parameters = None, max_rows: int | None = None, timeout: float | None = None) -> Answer:
        """Answer one query with at most `max_rows` rows, within `timeout` seconds."""
        with self._running(sql, parameters, timeout) as result:
            rows = result.fetchall() if max_rows is None else result.fetchmany(max_rows + 1)
            names = tuple(column[0] for column in result.description)
            types = tuple(str(column[1]) for column in result.description)
        return Answer(names, types, rows[:max_rows], max_rows is not None and len(rows) > max_rows)

    def rows(
        self, sql: str, parameters: Parameters = None, max_rows: int | None = None, timeout: float | None = None
    ) -> list[tuple[Any, ...]]:
        """The rows of one query as tuples."""
        return self.ask(sql, parameters, max_rows, timeout).rows

    def arrow(self, sql: str, parameters: Parameters = None, timeout: float | None = None) -> "pyarrow.Table":
        """The rows of one query as an Arrow table."""
        with self._running(sql, parameters, timeout) as result:
            return result.to_arrow_table()

    def pandas(self, sql: str, parameters: Parameters = None, timeout: float | None = None) -> "pandas.DataFrame":
        """The rows of one query as a pandas frame."""
        with self._running(sql, parameters, timeout) as result:
            return result.df()

    def relations(self) -> dict[str, list[Column]]:
        """The columns of each relation, with what they mean."""
        found: dict[str, list[Column]] = {}
        for name, *column in self.rows(_RELATIONS):
            found.setdefault(name, []).append(Column(*column))
        return found

    @contextmanager
    def _running(self, sql: str, parameters: Parameters, timeout: float | None) -> Iterator[duckdb.DuckDBPyConnection]:
        """The result of one statement, while a timer watches it."""
        timer = threading.Timer(timeout, self._connection.interrupt) if timeout is not None else None
        try:
            statement = self._parse(sql)
            if timer:
                timer.start()
            yield self._connection.execute(statement, parameters)
        except duckdb.InterruptException:
            raise QueryError(f"stopped after {timeout:g} s; make the query narrower, or raise --timeout") from None
        except duckdb.Error as error:
            raise QueryError(self._explain(error)) from None
        finally:
            if timer:
                timer.cancel()

    def _parse(self, sql: str) -> duckdb.Statement:
        """The one SELECT in `sql`."""
        words = _words(sql)
        if words[:1] == ["pragma"]:
            raise QueryError("PRAGMA is refused: write DESCRIBE <relation>, SHOW TABLES or SUMMARIZE <relation>")
        if called := next((a for a, b in pairwise(words) if a in REFUSED and b == "("), None):
            raise QueryError(f"{called}() is refused here")
        statements = self._connection.extract_statements(sql)
        if len(statements) != 1 and words[:1] == ["pivot"]:
            raise QueryError("PIVOT must name its values here: PIVOT ... ON column IN (value, ...)")
        if len(statements) != 1:
            raise QueryError(f"expected one statement, found {len(statements)}")
        if statements[0].type != duckdb.StatementType.SELECT:
            raise QueryError(
                f"{statements[0].type.name} is refused: the catalogue is read-only; ask with SELECT, FROM, DESCRIBE or SUMMARIZE"
            )
        return statements[0]

    def _explain(self, error: duckdb.Error) -> str:
        """DuckDB's message in our words, where ours help more."""
        text = str(error)
        if isinstance(error, duckdb.OutOfMemoryException):
            return f"needs more than {memory_limit(READER_MB)} of memory; aggregate or filter more, or ask for fewer rows at once"
        if missing := re.search(r"Table with name (.+?) does not exist", text):
            names = list(self.relations())
            near = difflib.get_close_matches(missing[1].lower(), names, n=1)
            guess = f"did you mean {near[0]}? " if near else ""
            return f"no relation {missing[1]!r}; {guess}the catalogue has {', '.join(names)}"
        return text


_RELATIONS = """
    SELECT table_name, column_name, data_type, coalesce(comment, '') FROM duckdb_columns()
    WHERE database_name = 'catalogue' ORDER BY table_name, column_index
"""


def _connect(path: Path) -> duckdb.DuckDBPyConnection:
    """Attached to a database of its own in memory: `connect(path)` would hand out the old file where another reader still holds it."""
    if not path.is_file():
        raise QueryError(f"{path}: no catalogue; make it with `dvc repro` (or `make demo`), or name one with --catalog FILE")
    settings: dict[str, Any] = {**SEALED, "memory_limit": memory_limit(READER_MB), "temp_directory": ""}
    connection = duckdb.connect(":memory:", config=settings)
    try:
        connection.execute(f"ATTACH {quote(str(path))} AS catalogue (READ_ONLY)")
        connection.execute("USE catalogue")
    except duckdb.Error as error:
        connection.close()
        raise QueryError(f"{path}: not a catalogue ({error}); make it again with `dvc repro catalog`") from None
    connection.execute("SET enable_progress_bar = false")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
    return connection


def _words(sql: str) -> list[str]:
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
