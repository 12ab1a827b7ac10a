"""What is checked of the catalogue: every relation that users query is there and has rows."""

from typing import Any

import duckdb
import pandas as pd

from ommatid.catalog.stage import RELATIONS
from ommatid.config import Params
from ommatid.quality.base import SHOWN, Frames, Rule, filled, named, one_of, zero
from ommatid.schemas import TABLES
from ommatid.store import Artefact


def profile(artefact: Artefact, params: Params) -> Frames:
    """Frames `relations` (one row a relation) and `features` (one row)."""
    with duckdb.connect(str(artefact.file("catalog.duckdb")), read_only=True) as connection:
        relations = [_relation(connection, name) for name in RELATIONS]
        readable = all(row["rows"] is not None for row in relations)
        features = _features(connection) if readable else {"latents not in features once": None, "first such": ""}
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
    """Latents that do not have exactly one row in `features`."""
    features = "(SELECT sae, latent, count(*) AS n FROM features GROUP BY ALL)"
    odd = connection.execute(
        f"SELECT latent, coalesce(n, 0) FROM latents FULL JOIN {features} USING (sae, latent) "
        "WHERE n IS DISTINCT FROM 1 OR density IS NULL ORDER BY latent"
    ).fetchall()
    return {"latents not in features once": len(odd), "first such": named([f"latent {n} ({times} times)" for n, times in odd[:SHOWN]])}


def rules(params: Params) -> list[Rule]:
    """Rules under which every relation that users query is there and has rows."""
    return [
        one_of(
            "relations",
            "problem",
            [""],
            "every relation is present and has rows",
            "queries, pages and docs count on each of them",
            row="relation",
        ),
        filled("features", "latents not in features once", "features can be compared with latents", "see the next check", row="relation"),
        zero(
            "features",
            "latents not in features once",
            "features has one row for each latent",
            "a join that drops or repeats a latent makes every count and mean over features wrong",
            row="relation",
            first="first such",
        ),
    ]
