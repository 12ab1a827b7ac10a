"""Parts that the files of all stages share: rules, functions that make the common ones, and readers that reduce tables to small frames."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa

from ommatid.store import Artefact

Frames = dict[str, pd.DataFrame]
"""A profile: an artefact reduced to small frames, each with a name."""

SHOWN = 3
"""Number of failing rows of a part that are named; the rest are counted."""


@dataclass(frozen=True)
class Rule:
    """An expectation on one column of one frame of a profile."""

    frame: str
    """Name of the frame in the profile."""
    column: str
    """Column of the frame."""
    name: str
    """What must hold, in a few words: the title of the check."""
    reason: str
    """Why it must hold: what would go wrong later."""
    expectation: str
    """Class in great_expectations.expectations."""
    arguments: dict[str, Any]
    """Arguments of the expectation beside the column."""
    row: str
    """Column whose value names a failing row."""
    first: str | None
    """Column that names the first failing things inside that row, such as tokens of a part."""
    sae: str | None = None
    """Name of the SAE that the rule is about, where the artefact holds several."""


def within(frame: str, column: str, name: str, reason: str, *, row: str, first: str | None = None, **bounds: Any) -> Rule:
    """Rule that values lie between min_value and max_value (exclusive with strict_min, strict_max); nulls are not looked at."""
    return Rule(frame, column, name, reason, "ExpectColumnValuesToBeBetween", bounds, row, first)


def zero(frame: str, column: str, name: str, reason: str, *, row: str = "part", first: str | None = None) -> Rule:
    """Rule that the column, a count of faults, is 0 in every row."""
    return within(frame, column, name, reason, row=row, first=first, min_value=0, max_value=0)


def one_of(frame: str, column: str, values: list[Any], name: str, reason: str, *, row: str) -> Rule:
    """Rule that every value is one of `values`."""
    return Rule(frame, column, name, reason, "ExpectColumnValuesToBeInSet", {"value_set": values}, row, None)


def filled(frame: str, column: str, name: str, reason: str, *, row: str) -> Rule:
    """Rule that no value is null."""
    return Rule(frame, column, name, reason, "ExpectColumnValuesToNotBeNull", {}, row, None)


def files_of(artefact: Artefact, table: str) -> list[Path]:
    """Files of a table; none where the artefact has no such table: a rule names what is missing better than an error."""
    return artefact.files(table) if table in artefact.tables else []


def table_of(artefact: Artefact, table: str, columns: list[str]) -> pd.DataFrame:
    """Columns of a table that is small enough to be read whole; no rows where the artefact has no such table."""
    return artefact.read(table, columns).to_pandas() if table in artefact.tables else pd.DataFrame(columns=columns)


def iter_batches(artefact: Artefact, part: str, columns: list[str], n_rows: int) -> Iterator[pa.RecordBatch]:
    """Rows of a part, at most `n_rows` at a time."""
    with artefact.open_part(part) as file:
        yield from file.iter_batches(batch_size=n_rows, columns=columns)


def query(sql: str, files: list[Path]) -> list[tuple[Any, ...]]:
    """Rows that `sql` returns, where {} stands for all rows of the files; none without files."""
    with _connect() as connection:
        return connection.execute(sql.format(_scan(files))).fetchall() if files else []


def select(columns: str, files: list[Path]) -> dict[str, Any]:
    """One row of aggregates over the files, with the name of the first file; lists of places become text."""
    with _connect() as connection:
        cursor = connection.execute(f"SELECT {columns} FROM {_scan(files)}")
        names = [column[0] for column in cursor.description or ()]
        values = cursor.fetchone() or ()
    row = {name: named(value) if name.startswith("first") else value for name, value in zip(names, values, strict=True)}
    return {"part": files[0].name, **row}


def named(places: list[str] | None) -> str:
    """The places as text, such as the first failing rows of a part."""
    return ", ".join(places or ())


def _connect() -> duckdb.DuckDBPyConnection:
    return duckdb.connect(config={"autoinstall_known_extensions": False, "memory_limit": "1GB"})


def _scan(files: list[Path]) -> str:
    names = ", ".join("'" + str(path).replace("'", "''") + "'" for path in files)
    return f"read_parquet([{names}], hive_partitioning=false)"
