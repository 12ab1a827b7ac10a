"""Profile and rules of the stage `catalog`: every relation that users query is present and has rows."""

from typing import Any

import duckdb
import pandas as pd

from ommatid.catalog.stage import RELATIONS
from ommatid.config import Params
from ommatid.quality.base import SHOWN, Frames, Rule, filled, named, one_of, zero
from ommatid.schemas import TABLES
from ommatid.store import Artefact


def profile(artefact: Artefact, params: Params) -> Frames:
    """Make the frames `relations` (one row for each relation) and `features` (one row)."""
    with duckdb.connect(str(artefact.file("catalog.duckdb")), read_only=True) as connection:
        relations = [_relation(connection, name) for name in RELATIONS]
        readable = all(row["rows"] is not None for row in relations)
        features = _features(connection) if readable else {"latents not in features exactly once": None, "first such": ""}
    return {"relations": pd.DataFrame(relations), "features": pd.DataFrame([{"relation": "features", **features}])}


def _relation(connection: duckdb.DuckDBPyConnection, name: str) -> dict[str, Any]:
    try:
        row = connection.execute(f"SELECT count(*) FROM {name}").fetchone()
    except duckdb.Error as error:
        return {"relation": name, "problem": f"cannot be read: {str(error).splitlines()[0]}", "rows": None}
    assert row is not None, name
    must_have_rows = name not in TABLES or not TABLES[name].may_be_empty
    return {"relation": name, "problem": "empty" if must_have_rows and not row[0] else "", "rows": row[0]}


def _features(connection: duckdb.DuckDBPyConnection) -> dict[str, Any]:
    """Count and name the latents that do not have exactly one row in `features`, or whose row there has no density."""
    features = "(SELECT sae, latent, count(*) AS n FROM features GROUP BY ALL)"
    odd = connection.execute(
        f"SELECT latent, coalesce(n, 0) FROM latents FULL JOIN {features} USING (sae, latent) "
        "WHERE n IS DISTINCT FROM 1 OR density IS NULL ORDER BY latent"
    ).fetchall()
    return {
        "latents not in features exactly once": len(odd),
        "first such": named([f"latent {n} ({times} times)" for n, times in odd[:SHOWN]]),
    }


def rules(params: Params) -> list[Rule]:
    """Make the rules under which every relation that users query is present and has rows."""
    return [
        one_of(
            "relations",
            "problem",
            [""],
            "every relation is present and has rows",
            "queries, pages and docs rely on each of them",
            row="relation",
        ),
        filled(
            "features",
            "latents not in features exactly once",
            "features can be compared with latents",
            "the next check needs all relations",
            row="relation",
        ),
        zero(
            "features",
            "latents not in features exactly once",
            "features has one row for each latent",
            "a join that drops or repeats a latent falsifies every count and mean over features",
            row="relation",
            first="first such",
        ),
    ]
