"""Stage `catalog`: builds a single DuckDB file from the artefacts, which can be queried without them."""

import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from ommatid import schemas, tracking
from ommatid.catalog.database import SEALED, memory_mb, quote, settings
from ommatid.catalog.lineage import Lineage, SAEArtefacts, iter_saes, make_runs
from ommatid.catalog.meanings import iter_meanings
from ommatid.catalog.neighbours import iter_directions, iter_neighbours
from ommatid.config import CatalogParams
from ommatid.errors import ArtefactError, find_lack
from ommatid.events import Listener, Progress, ignore
from ommatid.stage import is_checkouts
from ommatid.store import Artefact, Draft, open_artefact
from ommatid.store.per_sae import any_activations
from ommatid.summaries import CatalogSummary

CATALOG = "catalog.duckdb"
BLOCK_BYTES = 2**16
"""Size of a block of the file. A page of the explorer reads a few rows of many columns, and so a block of each: small ones are faster."""
WRITER_MB = 1024
"""Memory limit of DuckDB while it builds the catalogue, in MB; beyond it, DuckDB spills to the draft."""

_SQL = resources.files("ommatid.catalog").joinpath("sql")
RELATIONS = (*(table for table in schemas.TABLES if _SQL.joinpath(f"{table}.sql").is_file()), *schemas.DERIVED)
"""All relations, in the order in which they are built."""
_TABLES = {*RELATIONS, *itertools.chain(*schemas.DERIVED.values())}
"""Tables that the SQL files read."""
_READ = {"images": frozenset(schemas.IMAGES.names) - {"encoded"}}
"""Columns to read from tables that are not read in full."""


def run(params: CatalogParams, inputs: Mapping[str, Artefact], draft: Draft, on_event: Listener = ignore) -> Artefact:
    """Build the catalogue, with the lineage of each SAE from MLflow, git and DVC; see `build_catalog`."""
    is_versioned = is_checkouts(inputs["train"].folder.parent)
    return build_catalog(params, inputs, draft, tracking.lineage(inputs["train"].each(), is_versioned), on_event)


def build_catalog(
    params: CatalogParams,
    inputs: Mapping[str, Artefact],
    draft: Draft,
    lineage: Lineage,
    on_event: Listener = ignore,
) -> Artefact:
    """Build catalog.duckdb from the images, all SAEs (`train`), their evaluations, their labels and their interventions.

    Args:
        params: The section `catalog` of params.yaml.
        inputs: Artefacts by stage. `images`, `train`, `evaluate`, `label` and `intervene` are required; with `extract`, the relation
            `images` has the share of each image that the model sees. The params of all of them are in the relation `runs`.
        draft: Draft to write the catalogue to.
        lineage: For each SAE, git_commit, git_dirty ("true" or "false"), dvc_experiment, dvc_lock, mlflow_run_id and
            prefect_flow_run_id; None or missing if not known.
        on_event: Called with each progress event and warning.

    Returns:
        The sealed artefact.

    Raises:
        ArtefactError: An input is damaged (the message names all damaged files), or the catalogue cannot be written.
    """
    try:
        if not draft.has(CATALOG):
            _write(params, inputs, draft, lineage, on_event)
        return draft.seal(_summary(draft.local(CATALOG), inputs["train"]))
    except (ArtefactError, duckdb.Error, pa.ArrowInvalid, SafetensorError, OSError) as error:
        _check_inputs(inputs)
        # Errors about what the machine lacks are explained by the caller, as in every stage.
        if find_lack(error) is None and isinstance(error, (duckdb.IOException, duckdb.FatalException, OSError)):
            raise ArtefactError(f"{draft.url}: the catalogue cannot be written: {error}") from error
        raise


def _check_inputs(inputs: Mapping[str, Artefact]) -> None:
    """Verify all inputs.

    Raises:
        ArtefactError: Inputs are damaged; the message names everything that is missing or changed.
    """
    damage = []
    for artefact in inputs.values():
        try:
            open_artefact(artefact.folder, artefact.manifest.kind).verify()
        except ArtefactError as error:
            damage.append(str(error))
    if damage:
        raise ArtefactError("\n".join(damage))


def _write(params: CatalogParams, inputs: Mapping[str, Artefact], draft: Draft, lineage: Lineage, on_event: Listener) -> None:
    """Build the catalogue in the scratch folder, from the beginning, as a database left by a killed process cannot be trusted."""
    work = draft.scratch / "building"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    saes = dict(iter_saes(inputs))
    pq.write_table(make_runs(params, inputs, saes, lineage), work / "runs.parquet")
    preprocessing = any_activations(inputs).summary["preprocessing"] if "extract" in inputs else {}
    values = {"resize": preprocessing.get("resize"), "crop": preprocessing.get("crop"), "runs": str(work / "runs.parquet")}
    files = _files(saes, inputs)
    values |= {**files, **_compute(params, saes, inputs, files, work)}
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
        "default_block_size": BLOCK_BYTES,
        "preserve_insertion_order": "false",
    }


def _create(connection: duckdb.DuckDBPyConnection, relation: str, values: Mapping[str, Any]) -> None:
    """Run the SQL file of a relation, and add comments on the relation and on columns that the file has no comment for."""
    sql = _SQL.joinpath(f"{relation}.sql").read_text(encoding="utf-8")
    connection.execute("SET enable_progress_bar = false")
    for statement in connection.extract_statements(sql):
        connection.execute(statement, {name: values[name] for name in statement.named_parameters})
    connection.execute(f"COMMENT ON TABLE {relation} IS {quote(_header(sql))}")
    bare = "SELECT column_name FROM duckdb_columns() WHERE table_name = ? AND comment IS NULL"
    for (column,) in connection.execute(bare, [relation]).fetchall():
        connection.execute(f'COMMENT ON COLUMN {relation}."{column}" IS {quote(_meaning(relation, column))}')


def _header(sql: str) -> str:
    """Comment at the top of a relation's SQL file, on one line."""
    lines = re.match(r"(?:--.*\n)+", sql)
    assert lines, sql
    return " ".join(line.removeprefix("--").strip() for line in lines[0].splitlines())


def _meaning(relation: str, column: str) -> str:
    tables = [schemas.TABLES[table].schema for table in schemas.DERIVED.get(relation, (relation,))]
    fields = [schema.field(column) for schema in tables if column in schema.names]
    assert fields, f"{relation}.{column}: neither its SQL nor {len(tables)} schemas say what it means"
    return fields[0].metadata[b"meaning"].decode()


def _files(saes: Mapping[str, SAEArtefacts], inputs: Mapping[str, Artefact]) -> dict[str, list[str]]:
    """Parquet files of the tables behind the relations, for all SAEs, by the name of the parameter in SQL."""
    holders: dict[schemas.Place, list[Artefact]] = {
        "images": [inputs["images"]],
        "sae/<sae>": [artefacts.sae for artefacts in saes.values()],
        "evaluation": [inputs["evaluate"]],
        "evaluation/<sae>": [artefacts.evaluation for artefacts in saes.values()],
        "labels/<sae>": [artefacts.labels for artefacts in saes.values()],
        "interventions/<sae>": [artefacts.effects for artefacts in saes.values()],
    }
    found = {name: holders[table.place] for name, table in schemas.TABLES.items() if name in _TABLES and table.place in holders}
    return {name: [str(path) for artefact in held for path in artefact.files(name, _READ.get(name))] for name, held in found.items()}


def _compute(
    params: CatalogParams, saes: Mapping[str, SAEArtefacts], inputs: Mapping[str, Artefact], files: Mapping[str, list[str]], work: Path
) -> dict[str, list[str]]:
    """Compute the tables that no earlier stage writes, as Parquet files, so that DuckDB reads them like every other table."""

    def meanings(artefacts: SAEArtefacts) -> Iterator[pa.Table]:
        if "extract" not in inputs:
            return
        firings = [str(path) for path in artefacts.evaluation.files("firings")]
        d_sae = artefacts.evaluation.rows("latents")
        yield from iter_meanings(any_activations(inputs), files["images"], firings, artefacts.name, d_sae)

    makers: dict[str, Callable[[SAEArtefacts], Iterator[pa.Table]]] = {
        "neighbours": lambda artefacts: iter_neighbours(artefacts.sae.path, artefacts.name, params.n_neighbours),
        "directions": lambda artefacts: iter_directions(artefacts.sae.path, artefacts.name),
        "meanings": meanings,
    }
    for name, make in makers.items():
        with pq.ParquetWriter(work / f"{name}.parquet", schemas.TABLES[name].schema) as writer:
            for artefacts in saes.values():
                for table in make(artefacts):
                    writer.write_table(table)
    return {name: [str(work / f"{name}.parquet")] for name in makers}


def _summary(path: Path, training: Artefact) -> CatalogSummary:
    """Names of the SAEs, and rows of each relation."""
    with duckdb.connect(path, read_only=True, config=dict(SEALED)) as connection:
        counts = {}
        for relation in RELATIONS:
            row = connection.execute(f"SELECT count(*) FROM {relation}").fetchone()
            assert row is not None, relation
            counts[relation] = row[0]
    return CatalogSummary(saes=training.children, rows=counts)
