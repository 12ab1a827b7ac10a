"""Profile and rules of the stage `catalog`: every relation that users query is present and has rows."""

from typing import Any

import duckdb
import pandas as pd

from ommatid.catalog.stage import RELATIONS
from ommatid.config import Params
from ommatid.quality.base import SHOWN, Frames, Rule, filled, named, one_of, zero
from ommatid.schemas import TABLES
from ommatid.store import Artefact

VECTORS = {"directions": "direction", "meanings": "embedding"}
"""Relations with a vector for each latent, and the columns that hold it."""
_ODD = "latents without the one vector that they should have"
_WIDTHS = "vectors of another width than most"


def profile(artefact: Artefact, params: Params) -> Frames:
    """Make the frames `relations` (one row for each relation), `features` (one row) and `vectors` (a row for each relation of vectors)."""
    with duckdb.connect(str(artefact.file("catalog.duckdb")), read_only=True) as connection:
        relations = [_relation(connection, name) for name in RELATIONS]
        readable = all(row["rows"] is not None for row in relations)
        features = _features(connection) if readable else {"latents not in features exactly once": None, "first such": ""}
        vectors = [_vectors(connection, name, column) for name, column in VECTORS.items()] if readable else []
    return {
        "relations": pd.DataFrame(relations),
        "features": pd.DataFrame([{"relation": "features", **features}]),
        "vectors": pd.DataFrame(vectors, columns=["relation", _ODD, "first odd", _WIDTHS, "first of another width"]),
    }


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


def _vectors(connection: duckdb.DuckDBPyConnection, name: str, column: str) -> dict[str, Any]:
    """Count and name the latents whose vector is missing, repeated, or of another width than most of the SAE's vectors.

    Every latent has a direction. A latent that fires has a meaning, unless there are no meanings at all.
    """
    has_one = "1" if name == "directions" else f"(l.n_images > 0 AND EXISTS (FROM {name}))::INTEGER"
    odd = connection.execute(
        f"SELECT latent, coalesce(v.n, 0) FROM latents AS l FULL JOIN (SELECT sae, latent, count(*) AS n FROM {name} GROUP BY ALL) AS v "
        f"USING (sae, latent) WHERE coalesce(v.n, 0) IS DISTINCT FROM {has_one} ORDER BY latent"
    ).fetchall()
    uneven = connection.execute(
        f"SELECT latent, octet_length({column}) FROM {name} "
        f"QUALIFY octet_length({column}) <> mode(octet_length({column})) OVER (PARTITION BY sae) ORDER BY latent"
    ).fetchall()
    return {
        "relation": name,
        _ODD: len(odd),
        "first odd": named([f"latent {n} ({times})" for n, times in odd[:SHOWN]]),
        _WIDTHS: len(uneven),
        "first of another width": named([f"latent {n} ({width} bytes)" for n, width in uneven[:SHOWN]]),
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
        zero(
            "vectors",
            _ODD,
            "every latent has its direction, and every latent that fires its meaning",
            "search by words and reviews would miss the latents that have none",
            row="relation",
            first="first odd",
        ),
        zero(
            "vectors",
            _WIDTHS,
            "all vectors of an SAE have the same width",
            "they are compared with each other as the rows of one matrix",
            row="relation",
            first="first of another width",
        ),
    ]
