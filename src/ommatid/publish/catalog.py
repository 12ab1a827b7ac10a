"""What a published catalogue says of SAEs that it is not about: all that were decided on, and how the last champion's latents match."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb

from ommatid.catalog.database import SEALED


def write_runs(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Put rows into `runs` of a catalogue that nobody reads yet, in place of those about the same SAE; of several the last is kept.

    A column that the catalogue does not have is left out, one that a row does not have is null: rows may be older than the catalogue.
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
    """Add the rows of a Parquet file to each of these relations of a catalogue that nobody reads yet."""
    with duckdb.connect(path, config=dict(SEALED)) as connection:
        for relation, file in files.items():
            connection.execute(f'INSERT INTO "{relation}" BY NAME FROM read_parquet(?)', [str(file)])
        connection.execute("CHECKPOINT")


def _value(value: Any) -> Any:
    return value.astimezone(UTC).replace(tzinfo=None) if isinstance(value, datetime) and value.tzinfo else value
