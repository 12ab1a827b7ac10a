"""What is checked of an evaluation: every latent is described within the bounds of each metric, and the SAE beats an untrained one."""

import numpy as np
import pandas as pd
import pyarrow as pa

from ommatid.config import Params
from ommatid.quality.base import SHOWN, Frames, Rule, files_of, filled, named, one_of, select, table_of, within, zero
from ommatid.store import Artefact


def profile(artefact: Artefact, params: Params) -> Frames:
    """Frames `latents`, `counts` (one row), `sizes` and `undefined` (one a table), `sums`, `examples` and `firings` (one a part)."""
    latents = table_of(artefact, "latents", ["latent", "density", "is_dead", "ms"])
    known = set(latents["latent"].tolist())
    latents["dead disagrees"] = latents["is_dead"].astype(bool) != (latents["density"] == 0)
    comparisons = table_of(artefact, "comparisons", ["dictionary", "fvu", "ms", "ms_floor", "dead"])
    fvu, above, dead = (
        dict(zip(comparisons["dictionary"], values, strict=True))
        for values in (comparisons["fvu"], comparisons["ms"] - comparisons["ms_floor"], comparisons["dead"])
    )
    zero_shot = table_of(artefact, "zero_shot", ["spliced", "cross_entropy"])
    spliced = dict(zip(zero_shot["spliced"], zero_shot["cross_entropy"], strict=True))
    odd = sorted((set(range(params.train.d_sae)) ^ known) | set(latents["latent"][latents["latent"].duplicated()].tolist()))
    counts = {
        "set": "all latents",
        "latents missing or repeated": len(odd),
        "first missing": named([f"latent {n}" for n in odd[:SHOWN]]),
        "latents with ms": latents["ms"].count(),
        "fvu of the sae": fvu.get("sae", np.nan),
        "ms above floor": above.get("sae", np.nan),
        "dead share": dead.get("sae", np.nan),
        "fvu below untrained": fvu.get("untrained", np.nan) - fvu.get("sae", np.nan),
        "dictionaries missing": len({"sae", "untrained", "neurons"} - set(fvu)),
        "first dictionaries": named(sorted({"sae", "untrained", "neurons"} - set(fvu))),
        "zero-shot changed by splicing": abs(spliced.get("sae_with_error", np.nan) - spliced.get("plain", np.nan)),
    }
    return {
        "latents": latents,
        "counts": pd.DataFrame([counts]),
        "examples": pd.DataFrame([select(_EXAMPLE_PART, [path]) for path in files_of(artefact, "examples")]),
        "firings": pd.DataFrame([select(_firing_part(params.train.d_sae), [path]) for path in files_of(artefact, "firings")]),
        "sizes": pd.DataFrame([{"table": table, "rows": artefact.rows(table)} for table in ("examples", "firings")]),
        "sums": _sums(artefact),
        "undefined": _undefined(artefact),
    }


_EXAMPLE_PART = f"""
    count(*) AS rows,
    count(*) FILTER (decile NOT BETWEEN 1 AND 10) AS "examples of no decile",
    arg_min('latent ' || latent || ' image ' || image || ' decile ' || decile, latent, {SHOWN})
        FILTER (decile NOT BETWEEN 1 AND 10) AS "first of no decile",
    count(*) FILTER (rank < 1) AS "examples of no rank",
    arg_min('latent ' || latent || ' image ' || image, latent, {SHOWN}) FILTER (rank < 1) AS "first of no rank"
"""


def _firing_part(d_sae: int) -> str:
    bad = f"NOT (act > 0 AND isfinite(act)) OR latent NOT BETWEEN 0 AND {d_sae - 1}"
    return f"""
        count(*) AS rows,
        count(*) FILTER ({bad}) AS "rows that are no firing",
        arg_min('image ' || image || ' latent ' || latent || ' act ' || act, image, {SHOWN}) FILTER ({bad}) AS "first no firing"
    """


_SMALL = ("latents", "comparisons", "fidelity", "densities", "cofiring", "levels", "probes")
"""Tables that are small enough to be read whole."""


def _sums(artefact: Artefact) -> pd.DataFrame:
    """One row a sum that two tables must agree on: what it is `of`, and the `difference` of its two sides."""
    tables = {table: artefact.read(table).to_pandas() for table in _SMALL if table in artefact.tables}
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


def _undefined(artefact: Artefact) -> pd.DataFrame:
    """One row a small table: how many values are NaN, and in which columns."""
    rows = []
    for table in _SMALL:
        if table in artefact.tables:
            found = _nans(artefact.read(table))
            rows.append({"table": table, "values that are NaN": sum(found.values()), "first columns": ", ".join(found)})
    return pd.DataFrame(rows, columns=["table", "values that are NaN", "first columns"])


def _nans(table: pa.Table) -> dict[str, int]:
    """Number of NaN in each column that has any."""
    floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    counts = {name: sum(value != value for value in table[name].drop_null().to_pylist()) for name in floats}
    return {name: n for name, n in counts.items() if n}


def rules(params: Params) -> list[Rule]:
    """Rules under which every latent is described within the bounds of each metric, and the SAE beats an untrained one."""
    return [
        zero(
            "counts",
            "latents missing or repeated",
            f"each of {params.train.d_sae} latents has one row",
            "the catalogue has one feature a latent",
            row="set",
            first="first missing",
        ),
        filled("latents", "density", "density is known", "density decides what is dead", row="latent"),
        within("latents", "density", "density is a share", "it is a share of tokens", row="latent", min_value=0, max_value=1),
        one_of(
            "latents",
            "dead disagrees",
            [False],
            "latents are dead if and only if their density is 0",
            "users filter by is_dead: it must say the same as density",
            row="latent",
        ),
        within(
            "latents",
            "ms",
            "monosemanticity lies between -1 and 1",
            "it is a weighted mean of cosines, so it lies between -1 and 1, or is null",
            row="latent",
            min_value=-1,
            max_value=1,
        ),
        within(
            "counts",
            "latents with ms",
            "some latent has a monosemanticity score",
            "with none, too few images or too few firings were evaluated to say anything",
            row="set",
            min_value=1,
        ),
        within("sizes", "rows", "there are examples and firings", "the pages and the labels are made of them", row="table", min_value=1),
        zero(
            "examples",
            "examples of no decile",
            "examples have a decile from 1 to 10",
            "pages and label scores take examples by decile",
            first="first of no decile",
        ),
        zero(
            "examples", "examples of no rank", "ranks of examples start at 1", "rank orders them within a decile", first="first of no rank"
        ),
        zero(
            "firings",
            "rows that are no firing",
            "firings are positive and belong to known latents",
            "a row of firings says that the latent fires",
            first="first no firing",
        ),
        zero(
            "counts",
            "dictionaries missing",
            "the baselines are present",
            "an SAE's numbers mean nothing without the raw neurons' and an untrained SAE's on the same data",
            row="set",
            first="first dictionaries",
        ),
        *_below_untrained(is_transcoder=params.train.target is not None),
        within(
            "counts",
            "fvu of the sae",
            "the SAE's FVU is below 1",
            "1 is what predicting the mean gives; this is on images it never saw",
            row="set",
            max_value=1,
            strict_max=True,
        ),
        within(
            "counts",
            "zero-shot changed by splicing",
            "splicing changes nothing by itself",
            "with what the SAE leaves out put back in, the model is the plain one: a larger cross-entropy would be no fault of the SAE",
            row="set",
            max_value=0.01,
        ),
        within(
            "counts",
            "fvu of the sae",
            "the SAE's FVU is above 0",
            "0 is a perfect copy of activations that it never saw: then what was decoded was compared with itself",
            row="set",
            min_value=0,
            strict_min=True,
        ),
        within(
            "counts",
            "dead share",
            "few latents are dead",
            f"more than evaluate.max_dead ({params.evaluate.max_dead:g}) dead: these images are few, or others than those of training",
            row="set",
            max_value=params.evaluate.max_dead,
        ),
        within(
            "counts",
            "ms above floor",
            "monosemanticity is above its floor on average",
            "the floor is the score of weights that know nothing: below it, activations and judge are of different images",
            row="set",
            min_value=0,
            strict_min=True,
        ),
        zero(
            "undefined",
            "values that are NaN",
            "no value is NaN",
            "what is undefined is null, which means and rankings leave out; one NaN makes a mean NaN and is the highest of a ranking",
            row="table",
            first="first columns",
        ),
        zero(
            "sums",
            "difference",
            "counts add up",
            "what one table counts another one lists: a difference is rows that were lost or counted twice",
            row="of",
        ),
    ]


def _below_untrained(is_transcoder: bool) -> list[Rule]:
    """Rules on FVU. No untrained SAE decodes what a transcoder decodes, so only the FVU of the transcoder itself must be there."""
    if is_transcoder:
        return [filled("counts", "fvu of the sae", "the FVU is a number", "NaN would pass for small in the next check", row="set")]
    return [
        filled("counts", "fvu below untrained", "both FVUs are numbers", "NaN would pass for small in the next two checks", row="set"),
        within(
            "counts",
            "fvu below untrained",
            "FVU is below the untrained SAE's",
            "else training did nothing for reconstruction",
            row="set",
            min_value=0,
            strict_min=True,
        ),
    ]
