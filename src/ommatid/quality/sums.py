"""Of an evaluation: what one table counts and another lists, and what is NaN."""

import pandas as pd
import pyarrow as pa

from ommatid.store import Artefact

SMALL = ("latents", "comparisons", "fidelity", "densities", "cofiring", "levels", "probes")
"""Tables that are read whole."""


def sums(artefact: Artefact) -> pd.DataFrame:
    """A row for each sum: what it is `of`, and the `difference` of its two sides."""
    tables = {table: artefact.read(table).to_pandas() for table in SMALL if table in artefact.tables}
    rows = []
    if "latents" in tables:
        counted = int(tables["latents"]["n_images"].sum())
        rows.append({"of": "firings and latents.n_images", "difference": artefact.rows("firings") - counted})
    if "levels" in tables and len(tables["levels"]):
        levels = tables["levels"].sort_values("level")
        covered = int((levels["last"] - levels["first"] + 1).sum())
        rows.append({"of": "latents of levels and latents", "difference": covered - artefact.rows("latents")})
    if "densities" in tables and "comparisons" in tables:
        listed = tables["densities"].groupby("dictionary")["n_latents"].sum()
        for dictionary, n in tables["comparisons"][["dictionary", "n_latents"]].itertuples(index=False):
            rows.append({"of": f"latents of {dictionary} in densities", "difference": int(listed.get(dictionary, 0)) - n})
    if "fidelity" in tables:
        for dictionary, kinds in tables["fidelity"].groupby("dictionary"):
            is_all = kinds["kind"] == "all"
            whole, parts = int(kinds["n_tokens"][is_all].sum()), int(kinds["n_tokens"][~is_all].sum())
            rows.append({"of": f"tokens of {dictionary} in fidelity", "difference": parts - whole})
    return pd.DataFrame(rows, columns=["of", "difference"])


def undefined(artefact: Artefact) -> pd.DataFrame:
    """A row for each small table: how many values are NaN, and in which columns."""
    rows = []
    for table in SMALL:
        if table in artefact.tables:
            found = _nans(artefact.read(table))
            rows.append({"table": table, "values that are NaN": sum(found.values()), "first columns": ", ".join(found)})
    return pd.DataFrame(rows, columns=["table", "values that are NaN", "first columns"])


def _nans(table: pa.Table) -> dict[str, int]:
    """NaN of each column that has some."""
    floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    counts = {name: sum(value != value for value in table[name].drop_null().to_pylist()) for name in floats}
    return {name: n for name, n in counts.items() if n}
