"""Stage `catalog`: artefacts in, one DuckDB file out that answers alone."""

import os
import re
import shutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from ommatid import schemas, tracking
from ommatid.catalog.database import SEALED, memory_mb, quote, settings
from ommatid.catalog.lineage import Lineage, OneSAE, iter_saes, make_runs
from ommatid.catalog.neighbours import iter_neighbours
from ommatid.config import CatalogParams
from ommatid.errors import ArtefactError, find_lack
from ommatid.events import Listener, Progress, ignore
from ommatid.stage import is_checkouts
from ommatid.store import Artefact, Draft, open_artefact
from ommatid.summaries import CatalogSummary

CATALOG = "catalog.duckdb"
WRITER_MB = 1024
"""Most memory that DuckDB takes while it builds; what does not fit is spilled to the draft."""

_SQL = resources.files("ommatid.catalog").joinpath("sql")
RELATIONS = (*(table for table in schemas.TABLES if _SQL.joinpath(f"{table}.sql").is_file()), *schemas.DERIVED)
"""Every relation, in the order in which they are built."""
_READ = {"images": frozenset(schemas.IMAGES.names) - {"encoded"}}
"""Columns that are read of a table, where it is not all."""


def run(params: CatalogParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore) -> Artefact:
    """Build the catalogue with the lineage of each SAE as MLflow, git and DVC know it; see `build_catalog`."""
    is_versioned = is_checkouts(inputs["train"].folder.parent)
    return build_catalog(params, inputs, draft, tracking.lineage(inputs["train"].each(), is_versioned), on_event)


def build_catalog(
    params: CatalogParams,
    inputs: Mapping[str, Artefact],
    draft: Draft,
    lineage: Lineage,
    on_event: Listener = ignore,
) -> Artefact:
    """Build catalog.duckdb from images and all SAEs (`train`), their evaluations and labels.

    Args:
        params: The section `catalog`.
        inputs: Artefacts by stage; `images`, `train`, `evaluate` and `label` are needed; with `extract`, images say what the
            model sees of them. The params of all of them are in `runs`.
        draft: Where it is written.
        lineage: Of each SAE git_commit, git_dirty ("true" or "false"), dvc_experiment, dvc_lock, mlflow_run_id,
            prefect_flow_run_id; null or absent where there is none.
        on_event: Hears of each relation.

    Raises:
        ArtefactError: an input is damaged (all damaged files are named), or the catalogue cannot be written.
    """
    try:
        if not draft.has(CATALOG):
            _write(params, inputs, draft, lineage, on_event)
        return draft.seal(_summary(draft.local(CATALOG), inputs["train"]))
    except (ArtefactError, duckdb.Error, pa.ArrowInvalid, SafetensorError, OSError) as error:
        _check_inputs(inputs)
        # what the machine lacks is told by the stage, as everywhere
        if find_lack(error) is None and isinstance(error, (duckdb.IOException, duckdb.FatalException, OSError)):
            raise ArtefactError(f"{draft.url}: the catalogue cannot be written: {error}") from error
        raise


def _check_inputs(inputs: Mapping[str, Artefact]) -> None:
    """Name all that is missing or changed in any input."""
    damage = []
    for artefact in inputs.values():
        try:
            open_artefact(artefact.folder, artefact.manifest.kind).verify()
        except ArtefactError as error:
            damage.append(str(error))
    if damage:
        raise ArtefactError("\n".join(damage))


def _write(params: CatalogParams, inputs: Mapping[str, Artefact], draft: Draft, lineage: Lineage, on_event: Listener) -> None:
    """Everything is made anew in the scratch folder: a database that a dying process left is not worth trusting."""
    work = draft.scratch / "building"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    saes = dict(iter_saes(inputs))
    pq.write_table(make_runs(params, inputs, saes, lineage), work / "runs.parquet")
    preprocessing = inputs["extract"].summary["preprocessing"] if "extract" in inputs else {}
    values = {"resize": preprocessing.get("resize"), "crop": preprocessing.get("crop"), "runs": str(work / "runs.parquet")}
    values |= {"neighbours": _write_neighbours(saes, params.n_neighbours, work), **_files(saes, inputs)}
    with draft.write_file(CATALOG) as path:
        with duckdb.connect(work / CATALOG, config=_settings(work)) as connection:
            for done, relation in enumerate(RELATIONS, start=1):
                _create(connection, relation, values)
                on_event(Progress("build relations", done, len(RELATIONS)))
            connection.execute("CHECKPOINT")
        os.replace(work / CATALOG, path)


def _settings(work: Path) -> dict[str, Any]:
    return {
        **settings(),
        "memory_limit": f"{memory_mb(WRITER_MB)}MB",
        "temp_directory": str(work / "spilled"),
        "preserve_insertion_order": "false",
    }


def _create(connection: duckdb.DuckDBPyConnection, relation: str, values: Mapping[str, Any]) -> None:
    """Run the relation's file, then comment on the relation and on the columns that the file does not comment on."""
    sql = _SQL.joinpath(f"{relation}.sql").read_text(encoding="utf-8")
    connection.execute("SET enable_progress_bar = false")
    for statement in connection.extract_statements(sql):
        connection.execute(statement, {name: values[name] for name in statement.named_parameters})
    connection.execute(f"COMMENT ON TABLE {relation} IS {quote(_header(sql))}")
    bare = "SELECT column_name FROM duckdb_columns() WHERE table_name = ? AND comment IS NULL"
    for (column,) in connection.execute(bare, [relation]).fetchall():
        connection.execute(f'COMMENT ON COLUMN {relation}."{column}" IS {quote(_meaning(relation, column))}')


def _header(sql: str) -> str:
    """The comment at the top of a relation's file, on one line."""
    lines = re.match(r"(?:--.*\n)+", sql)
    assert lines, sql
    return " ".join(line.removeprefix("--").strip() for line in lines[0].splitlines())


def _meaning(relation: str, column: str) -> str:
    tables = [schemas.TABLES[table].schema for table in schemas.DERIVED.get(relation, (relation,))]
    fields = [schema.field(column) for schema in tables if column in schema.names]
    assert fields, f"{relation}.{column}: neither its SQL nor {len(tables)} schemas say what it means"
    return fields[0].metadata[b"meaning"].decode()


def _files(saes: Mapping[str, OneSAE], inputs: Mapping[str, Artefact]) -> dict[str, list[str]]:
    """The Parquet files of the table behind each relation, of all SAEs, by the name of the parameter in SQL."""
    holders: dict[schemas.Place, list[Artefact]] = {
        "images": [inputs["images"]],
        "sae/<sae>": [one.sae for one in saes.values()],
        "evaluation": [inputs["evaluate"]],
        "evaluation/<sae>": [one.evaluation for one in saes.values()],
        "labels/<sae>": [one.labels for one in saes.values()],
    }
    found = {name: holders[table.place] for name, table in schemas.TABLES.items() if name in RELATIONS and table.place in holders}
    return {name: [str(path) for artefact in held for path in artefact.files(name, _READ.get(name))] for name, held in found.items()}


def _write_neighbours(saes: Mapping[str, OneSAE], n: int, work: Path) -> list[str]:
    """One Parquet file: DuckDB then reads neighbours as it reads every other table."""
    path = work / "neighbours.parquet"
    with pq.ParquetWriter(path, schemas.NEIGHBOURS) as writer:
        for one in saes.values():
            for table in iter_neighbours(one.sae.path, one.name, n):
                writer.write_table(table)
    return [str(path)]


def _summary(path: Path, training: Artefact) -> CatalogSummary:
    """Names of the SAEs, and rows of each relation."""
    with duckdb.connect(path, read_only=True, config=dict(SEALED)) as connection:
        counts = {}
        for relation in RELATIONS:
            row = connection.execute(f"SELECT count(*) FROM {relation}").fetchone()
            assert row is not None, relation
            counts[relation] = row[0]
    return CatalogSummary(saes=training.children, rows=counts)
