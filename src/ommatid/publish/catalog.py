"""Rows that a published catalogue has about other SAEs: all decisions so far, and matches with the previous champion's latents."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb

from ommatid.catalog.database import SEALED


def write_runs(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows to the relation `runs` of a catalogue that is not published yet, replacing those about the same SAE.

    Rows may come from older versions: columns that the catalogue lacks are dropped, and columns that a row lacks are null.

    Args:
        path: The catalogue's DuckDB file.
        rows: Rows, oldest first; if several are about the same SAE, the last one is kept.
    """
    last = {row["sae"]: row for row in rows}
    with duckdb.connect(path, config=dict(SEALED)) as connection:
        columns = [name for (name,) in connection.execute("SELECT column_name FROM duckdb_columns() WHERE table_name = 'runs'").fetchall()]
        connection.execute("BEGIN")
        for row in last.values():
            connection.execute("DELETE FROM runs WHERE sae = ?", [row["sae"]])
            known = {name: _value(row[name]) for name in columns if name in row}
            names, values = ", ".join(f'"{name}"' for name in known), ", ".join("?" for _ in known)
            connection.execute(f"INSERT INTO runs ({names}) VALUES ({values})", list(known.values()))
        connection.execute("COMMIT")
        connection.execute("CHECKPOINT")


def add_rows(path: Path, files: Mapping[str, Path]) -> None:
    """Append rows to relations of a catalogue that is not published yet.

    Args:
        path: The catalogue's DuckDB file.
        files: Parquet file of the rows to append, by relation.
    """
    with duckdb.connect(path, config=dict(SEALED)) as connection:
        for relation, file in files.items():
            connection.execute(f'INSERT INTO "{relation}" BY NAME FROM read_parquet(?)', [str(file)])
        connection.execute("CHECKPOINT")


def _value(value: Any) -> Any:
    return value.astimezone(UTC).replace(tzinfo=None) if isinstance(value, datetime) and value.tzinfo else value
