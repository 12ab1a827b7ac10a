"""Shared parts of the files of all stages: rules, makers of the common ones, and readers that reduce tables to small frames."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa

from ommatid.store import Artefact

Frames = dict[str, pd.DataFrame]
"""The profile of an artefact: small data frames by name."""

SHOWN = 3
"""Number of failing rows that a message names; it counts the rest."""


@dataclass(frozen=True)
class Rule:
    """An expectation on one column of one frame of a profile."""

    frame: str
    """Name of the frame in the profile."""
    column: str
    """Column of the frame."""
    name: str
    """Title of the check: what must hold, in a few words."""
    reason: str
    """Why it must hold: what would go wrong later if it did not."""
    expectation: str
    """Name of a class in `great_expectations.expectations`."""
    arguments: dict[str, Any]
    """Arguments of the expectation other than the column."""
    row: str
    """Column whose value names a failing row."""
    first: str | None
    """Column that lists the first failing items within such a row, for example tokens of a part."""
    sae: str | None = None
    """Name of the SAE that the rule is about; None unless the artefact holds several."""


def within(frame: str, column: str, name: str, reason: str, *, row: str, first: str | None = None, **bounds: Any) -> Rule:
    """Make a rule that values lie between `min_value` and `max_value` (exclusive with `strict_min` and `strict_max`); nulls pass."""
    return Rule(frame, column, name, reason, "ExpectColumnValuesToBeBetween", bounds, row, first)


def zero(frame: str, column: str, name: str, reason: str, *, row: str = "part", first: str | None = None) -> Rule:
    """Make a rule that the column, a count of faults, is 0 in every row."""
    return within(frame, column, name, reason, row=row, first=first, min_value=0, max_value=0)


def one_of(frame: str, column: str, values: list[Any], name: str, reason: str, *, row: str) -> Rule:
    """Make a rule that every value is one of `values`; nulls pass."""
    return Rule(frame, column, name, reason, "ExpectColumnValuesToBeInSet", {"value_set": values}, row, None)


def filled(frame: str, column: str, name: str, reason: str, *, row: str) -> Rule:
    """Make a rule that no value is null."""
    return Rule(frame, column, name, reason, "ExpectColumnValuesToNotBeNull", {}, row, None)


def files_of(artefact: Artefact, table: str) -> list[Path]:
    """Return the files of a table; none if the artefact lacks it, since a rule reports that better than an error would."""
    return artefact.files(table) if table in artefact.tables else []


def table_of(artefact: Artefact, table: str, columns: list[str]) -> pd.DataFrame:
    """Return columns of a table that is small enough to be read whole; no rows if the artefact lacks it."""
    return artefact.read(table, columns).to_pandas() if table in artefact.tables else pd.DataFrame(columns=columns)


def iter_batches(artefact: Artefact, part: str, columns: list[str], n_rows: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a part, at most `n_rows` at a time."""
    with artefact.open_part(part) as file:
        yield from file.iter_batches(batch_size=n_rows, columns=columns)


def query(sql: str, *tables: list[Path]) -> list[tuple[Any, ...]]:
    """Return the result of a query in which each {} stands for the rows of all files of a table; no rows if a table has no files."""
    with _connect() as connection:
        return connection.execute(sql.format(*map(_scan, tables))).fetchall() if all(tables) else []


def select(columns: str, files: list[Path]) -> dict[str, Any]:
    """Aggregate the rows of files.

    Args:
        columns: Aggregates, as in a SELECT clause. One whose name starts with `first` is a list of places, and becomes text.
        files: Files of one table.

    Returns:
        The aggregates by name, and the name of the first file as `part`.
    """
    with _connect() as connection:
        cursor = connection.execute(f"SELECT {columns} FROM {_scan(files)}")
        names = [column[0] for column in cursor.description or ()]
        values = cursor.fetchone() or ()
    row = {name: named(value) if name.startswith("first") else value for name, value in zip(names, values, strict=True)}
    return {"part": files[0].name, **row}


def named(places: list[str] | None) -> str:
    """Return a list of places, such as the first failing rows of a part, as text."""
    return ", ".join(places or ())


def _connect() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(config={"autoinstall_known_extensions": False, "memory_limit": "1GB"})


def _scan(files: list[Path]) -> str:
    names = ", ".join("'" + str(path).replace("'", "''") + "'" for path in files)
    return f"read_parquet([{names}], hive_partitioning=false)"
