"""Rows that a published catalogue has beside its own: all decisions so far, matches with the previous champion's latents, and drift."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb

from ommatid.catalog.database import SEALED, quote
from ommatid.schemas import TABLES


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


DRIFT = {
    "drift_checks": "drift_checks(check_id): a check of new images against the champion's, before a training on them, and its verdict.",
    "drift": "drift(check_id, latent): how a latent of the champion fires on new images and on the champion's own; of the newest checks.",
    "drift_images": "drift_images(check_id, latent, side, rank): an image on which a changed latent fires most, of the champion's or new.",
}
"""Relations about drift, each with its comment."""
N_CHECKS = 20
"""Number of the newest checks of which latents and images are published; of all others there are only the headline numbers."""


def write_drift(path: Path, checks: Sequence[Path]) -> None:
    """Write the relations about drift to a catalogue that is not published yet; without any check there are none.

    Args:
        path: The catalogue's DuckDB file.
        checks: Folder of each check, oldest first.
    """
    if not checks:
        return
    with duckdb.connect(path, config=dict(SEALED)) as connection:
        connection.execute("SET enable_progress_bar = false")
        for relation, comment in DRIFT.items():
            files = [str(check / f"{relation}.parquet") for check in (checks if relation == "drift_checks" else checks[-N_CHECKS:])]
            connection.execute(f"CREATE OR REPLACE TABLE {relation} AS SELECT * FROM read_parquet(?, union_by_name = true)", [files])
            connection.execute(f"COMMENT ON TABLE {relation} IS {quote(comment)}")
            for column in TABLES[relation].schema:
                meaning = quote(column.metadata[b"meaning"].decode())
                connection.execute(f'COMMENT ON COLUMN {relation}."{column.name}" IS {meaning}')
        connection.execute("CHECKPOINT")


def _value(value: Any) -> Any:
    return value.astimezone(UTC).replace(tzinfo=None) if isinstance(value, datetime) and value.tzinfo else value
