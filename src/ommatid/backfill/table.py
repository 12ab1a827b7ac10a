"""The catalogue of a backfill: one DuckDB file in which SAEs of all times are compared in SQL."""

import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import filelock
import pyarrow as pa

from ommatid import schemas
from ommatid.backfill.past import LeftOut
from ommatid.backfill.work import PLACE, Measured, read_headline
from ommatid.catalog.database import quote, settings
from ommatid.store.per_sae import read_config

CATALOG = PLACE / "catalog.duckdb"
"""File of the catalogue, relative to the checkout."""
_OF_EVALUATION = ("fvu", "cosine", "l0", "dead", "coverage", "uniqueness", "n_latents")
"""Numbers of an evaluation in which no judge has a part."""
_OF_JUDGE = ("ms", "ms_low", "ms_high", "ms_best", "ms_left_out", "ms_floor")
"""Numbers of a judge."""
_RELATIONS: Mapping[str, tuple[str, tuple[pa.Schema, ...]]] = {
    "runs": (
        "runs(sae): a past SAE under the present params, on the present images, with its scores by the main judge and of its best labels.",
        (schemas.PAST_RUNS, schemas.PAST_LABELLERS),
    ),
    "judges": ("judges(sae, judge): the scores of an SAE by each judge.", (schemas.PAST_JUDGES,)),
    "judged": ("judged(sae, latent, judge): the score of a latent by each judge.", (schemas.JUDGED,)),
    "labellers": ("labellers(sae, labeller): the labels of an SAE by each labeller, run and scored alone.", (schemas.PAST_LABELLERS,)),
    "labels": ("labels(sae, latent, labeller): the label of a latent by each labeller.", (schemas.LABELS,)),
    "left_out": ("left_out(sae): a past SAE that could not be measured.", (schemas.PAST_LEFT_OUT,)),
}
"""What each relation is, and the schemas that say what its columns mean."""


def write_catalog(measured: Sequence[Measured], left_out: Sequence[LeftOut]) -> Path:
    """Write the catalogue, replacing the last one as a whole, so that open readers keep the old file.

    Args:
        measured: The SAEs that were measured.
        left_out: Those that were not.

    Returns:
        The file.
    """
    work = PLACE / ".catalog"
    with filelock.FileLock(PLACE / "catalog.lock"):
        _write(work, measured, left_out)
        os.replace(work / CATALOG.name, CATALOG)
        shutil.rmtree(work)
    return CATALOG


def _write(work: Path, measured: Sequence[Measured], left_out: Sequence[LeftOut]) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    tables = {
        "runs": pa.Table.from_pylist([_sae_row(one) for one in measured], schema=schemas.PAST_RUNS),
        "judges": pa.Table.from_pylist([row for one in measured for row in _judge_rows(one)], schema=schemas.PAST_JUDGES),
        "left_out": pa.Table.from_pylist([_left_out_row(one) for one in left_out], schema=schemas.PAST_LEFT_OUT),
    }
    with duckdb.connect(work / CATALOG.name, config={**settings(), "temp_directory": str(work / "spilled")}) as connection:
        for name, table in tables.items():
            connection.register("rows", table)
            connection.execute(f"CREATE TABLE {name} AS FROM rows")
            connection.unregister("rows")
        _create_judged(connection, measured)
        _create_labels(connection, measured)
        connection.execute(_LABELLERS)
        connection.execute(_BEST)
        _comment(connection)
        connection.execute("CHECKPOINT")


def _sae_row(one: Measured) -> dict[str, Any]:
    config, summary = read_config(one.past.artefact), one.evaluation.summary
    main = next(iter(one.judged))
    scores = read_headline(one.judged[main])
    return {
        "sae": one.past.name,
        "decided_at": _naive(one.past.decided_at),
        "is_here": one.past.is_here,
        "sae_digest": one.past.artefact.digest,
        **{key: config.get(key) for key in ("model", "hookpoint", "target", "variant", "k")},
        **{key: summary[key] for key in _OF_EVALUATION},
        "judge": main,
        **{key: scores[key] for key in _OF_JUDGE},
    }


def _judge_rows(one: Measured) -> list[dict[str, Any]]:
    rows = [read_headline(path) for path in one.judged.values()]
    return [{"sae": one.past.name, "place": place, **row} for place, row in enumerate(rows, start=1)]


def _left_out_row(one: LeftOut) -> dict[str, Any]:
    return {"sae": one.sae, "decided_at": _naive(one.decided_at), "reason": one.reason}


def _naive(when: datetime | None) -> datetime | None:
    return when and when.astimezone(UTC).replace(tzinfo=None)


def _create_judged(connection: duckdb.DuckDBPyConnection, measured: Sequence[Measured]) -> None:
    connection.register("rows", schemas.JUDGED.empty_table())
    connection.execute("CREATE TABLE judged AS SELECT * EXCLUDE (dictionary) FROM rows")
    connection.unregister("rows")
    for one in measured:
        files = [str(path) for path in one.judged.values()]
        connection.execute(
            "INSERT INTO judged SELECT * EXCLUDE (dictionary) FROM read_parquet($files) ORDER BY judge, latent", {"files": files}
        )


def _create_labels(connection: duckdb.DuckDBPyConnection, measured: Sequence[Measured]) -> None:
    """Collect the labels; each labeller was run alone, so its name and place are those that it has among all."""
    connection.register("rows", schemas.LABELS.empty_table())
    connection.execute("CREATE TABLE labels AS FROM rows")
    connection.unregister("rows")
    for one in measured:
        for place, (name, artefact) in enumerate(one.labels.items(), start=1):
            files = [str(path) for path in artefact.files("labels")]
            sql = "INSERT INTO labels SELECT * REPLACE ($name AS labeller, $place::TINYINT AS place) FROM read_parquet($files)"
            connection.execute(sql, {"name": name, "place": place, "files": files})


_SCORES = """
    count(*) FILTER (status = 'ok') AS n_labelled,
    count(score) AS n_scored,
    avg(score) AS label_score,
    avg(control_score) FILTER (score IS NOT NULL) AS control_score,
    avg((score > control_score)::INTEGER) AS beats_control
"""
_LABELLERS = f"CREATE TABLE labellers AS SELECT sae, labeller, any_value(place) AS place, {_SCORES} FROM labels GROUP BY ALL ORDER BY ALL"
_BEST = f"""
    CREATE OR REPLACE TABLE runs AS
    WITH best AS (
        SELECT * FROM labels QUALIFY row_number() OVER (
            PARTITION BY sae, latent
            ORDER BY status = 'ok' DESC, starts_with(labeller, 'human') DESC, score DESC NULLS LAST, place, labeller
        ) = 1
    ), scored AS (SELECT sae, {_SCORES} FROM best GROUP BY sae)
    SELECT runs.*, coalesce(n_labelled, 0) AS n_labelled, label_score, control_score, beats_control
    FROM runs LEFT JOIN scored ON scored.sae = runs.sae
    ORDER BY decided_at NULLS LAST, runs.sae
"""
"""The best label of each latent is that which catalog/sql/features.sql chooses."""


def _comment(connection: duckdb.DuckDBPyConnection) -> None:
    """Comment on every relation and column."""
    for relation, (about, columns_of) in _RELATIONS.items():
        connection.execute(f"COMMENT ON TABLE {relation} IS {quote(about)}")
        for (column,) in connection.execute("SELECT column_name FROM duckdb_columns() WHERE table_name = ?", [relation]).fetchall():
            field = next(schema.field(column) for schema in columns_of if column in schema.names)
            connection.execute(f'COMMENT ON COLUMN {relation}."{column}" IS {quote(field.metadata[b"meaning"].decode())}')
