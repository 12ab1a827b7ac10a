"""Profile and rules of the stage `evaluate`: every latent is measured, metrics are within their bounds, and training has helped."""

import numpy as np
import pandas as pd
import pyarrow as pa

from ommatid.config import Params
from ommatid.quality.base import SHOWN, Frames, Rule, files_of, filled, named, one_of, query, select, table_of, within, zero
from ommatid.schemas import N_NEAR_MISSES
from ommatid.store import Artefact


def profile(artefact: Artefact, params: Params) -> Frames:
    """Make the frames of an evaluation.

    They are `latents` (one row for each latent), `counts` (one row), `examples`, `firings` and `near_misses` (one row for each part),
    `sizes` and `undefined` (one for each table), and `sums` (one for each pair of numbers that must agree).
    """
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
    firing = query(_FIRING_NEAR_MISSES, files_of(artefact, "near_misses"), files_of(artefact, "firings"))
    counts = {
        "set": "all latents",
        "latents missing or repeated": len(odd),
        "first missing": named([f"latent {n}" for n in odd[:SHOWN]]),
        "latents with ms": latents["ms"].count(),
        "fvu of the sae": fvu.get("sae", np.nan),
        "ms above floor": above.get("sae", np.nan),
        "dead share": dead.get("sae", np.nan),
        "fvu below untrained": fvu.get("untrained", np.nan) - fvu.get("sae", np.nan),
        "near misses that fire": sum(n for n, _ in firing),
        "first near misses that fire": named([place for _, places in firing for place in places]),
        "dictionaries missing": len({"sae", "untrained", "neurons"} - set(fvu)),
        "first dictionaries": named(sorted({"sae", "untrained", "neurons"} - set(fvu))),
        "zero-shot changed by splicing": abs(spliced.get("sae_with_error", np.nan) - spliced.get("plain", np.nan)),
    }
    return {
        "latents": latents,
        "counts": pd.DataFrame([counts]),
        "examples": pd.DataFrame([select(_EXAMPLE_PART, [path]) for path in files_of(artefact, "examples")]),
        "firings": pd.DataFrame([select(_firing_part(params.train.d_sae), [path]) for path in files_of(artefact, "firings")]),
        "near_misses": pd.DataFrame([select(_NEAR_MISS_PART, [path]) for path in files_of(artefact, "near_misses")]),
        "sizes": pd.DataFrame([{"table": table, "rows": artefact.rows(table)} for table in ("examples", "firings")]),
        "sums": _sums(artefact),
        "undefined": _undefined(artefact),
    }


_EXAMPLE_PART = f"""
    count(*) AS rows,
    count(*) FILTER (decile NOT BETWEEN 1 AND 10) AS "examples without a decile",
    arg_min('latent ' || latent || ' image ' || image || ' decile ' || decile, latent, {SHOWN})
        FILTER (decile NOT BETWEEN 1 AND 10) AS "first without a decile",
    count(*) FILTER (rank < 1) AS "examples without a rank",
    arg_min('latent ' || latent || ' image ' || image, latent, {SHOWN}) FILTER (rank < 1) AS "first without a rank"
"""


_NEAR_MISS_PART = f"""
    count(*) AS rows,
    count(*) FILTER (NOT (margin <= 0 AND isfinite(margin))) AS "margins above 0",
    arg_min('latent ' || latent || ' image ' || image || ' margin ' || margin, latent, {SHOWN})
        FILTER (NOT (margin <= 0 AND isfinite(margin))) AS "first margins above 0"
"""
_FIRING_NEAR_MISSES = f"""
    SELECT count(*), arg_min('latent ' || latent || ' image ' || image, latent, {SHOWN})
    FROM {{}} AS missed SEMI JOIN {{}} AS fired USING (latent, image)
    HAVING count(*) > 0
"""


def _firing_part(d_sae: int) -> str:
    bad = f"NOT (act > 0 AND isfinite(act)) OR latent NOT BETWEEN 0 AND {d_sae - 1}"
    return f"""
        count(*) AS rows,
        count(*) FILTER ({bad}) AS "rows that are not firings",
        arg_min('image ' || image || ' latent ' || latent || ' act ' || act, image, {SHOWN}) FILTER ({bad}) AS "first not firings"
    """


_SMALL = ("latents", "comparisons", "fidelity", "densities", "cofiring", "levels", "probes")
"""Tables that are small enough to be read whole, unlike the firings."""


def _sums(artefact: Artefact) -> pd.DataFrame:
    """Make the frame `sums`: numbers on which two tables must agree (`of`), and the `difference` that is found."""
    tables = {table: artefact.read(table).to_pandas() for table in _SMALL if table in artefact.tables}
    rows = []
    if "latents" in tables:
        counted = int(tables["latents"]["n_images"].sum())
        rows.append({"of": "firings and latents.n_images", "difference": artefact.rows("firings") - counted})
        alive = tables["latents"]["n_images"][~tables["latents"]["is_dead"].astype(bool)]
        silent = int((artefact.summary["n_images"] - alive).clip(0, N_NEAR_MISSES).sum())
        n = artefact.rows("near_misses") if "near_misses" in artefact.tables else 0
        rows.append({"of": "near misses and silent images", "difference": n - silent})
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
    """Make the frame `undefined`: how many values of each small table are NaN, and in which columns."""
    rows = []
    for table in _SMALL:
        if table in artefact.tables:
            found = _nans(artefact.read(table))
            rows.append({"table": table, "values that are NaN": sum(found.values()), "first columns": ", ".join(found)})
    return pd.DataFrame(rows, columns=["table", "values that are NaN", "first columns"])


def _nans(table: pa.Table) -> dict[str, int]:
    """Return the number of NaN values of each column that has any."""
    floats = [field.name for field in table.schema if pa.types.is_floating(field.type)]
    counts = {name: sum(value != value for value in table[name].drop_null().to_pylist()) for name in floats}
    return {name: n for name, n in counts.items() if n}


def rules(params: Params) -> list[Rule]:
    """Make the rules under which an evaluation is complete and consistent, and the SAE is worth publishing."""
    return [*_latent_rules(params.train.d_sae), *_comparison_rules(params), *_table_rules()]


def _latent_rules(d_sae: int) -> list[Rule]:
    """Make the rules on latents, and on the examples and firings that belong to them."""
    return [
        zero(
            "counts",
            "latents missing or repeated",
            f"each of {d_sae} latents has one row",
            "the catalogue has one feature for each latent",
            row="set",
            first="first missing",
        ),
        filled("latents", "density", "density is known", "density decides which latents are dead", row="latent"),
        within(
            "latents",
            "density",
            "density is a share",
            "it is the share of tokens on which the latent fires",
            row="latent",
            min_value=0,
            max_value=1,
        ),
        one_of(
            "latents",
            "dead disagrees",
            [False],
            "latents are dead if and only if their density is 0",
            "users filter by is_dead, which must agree with density",
            row="latent",
        ),
        within(
            "latents",
            "ms",
            "monosemanticity lies between -1 and 1",
            "it is a weighted mean of cosines",
            row="latent",
            min_value=-1,
            max_value=1,
        ),
        within(
            "counts",
            "latents with ms",
            "some latent has a monosemanticity score",
            "if none has one, too few images or too few firings were evaluated",
            row="set",
            min_value=1,
        ),
        within("sizes", "rows", "there are examples and firings", "pages and labels are made from them", row="table", min_value=1),
        zero(
            "examples",
            "examples without a decile",
            "examples have a decile from 1 to 10",
            "pages and label scores select examples by decile",
            first="first without a decile",
        ),
        zero(
            "examples",
            "examples without a rank",
            "ranks of examples start at 1",
            "they order the examples of a decile",
            first="first without a rank",
        ),
        zero(
            "firings",
            "rows that are not firings",
            "firings are positive and belong to known latents",
            "a row of firings means that the latent fires",
            first="first not firings",
        ),
        zero(
            "near_misses",
            "margins above 0",
            "margins of near misses are at most 0",
            "above 0 the latent would fire, and an undefined margin would rank first",
            first="first margins above 0",
        ),
        zero(
            "counts",
            "near misses that fire",
            "the latent does not fire on its near misses",
            "pages show them beside its firings, as what it leaves out",
            row="set",
            first="first near misses that fire",
        ),
    ]


def _comparison_rules(params: Params) -> list[Rule]:
    """Make the rules on the SAE as a whole, compared with an untrained one and with trivial results."""
    return [
        zero(
            "counts",
            "dictionaries missing",
            "the baselines are present",
            "an SAE's numbers mean nothing without those of the raw neurons and of an untrained SAE on the same data",
            row="set",
            first="first dictionaries",
        ),
        *_below_untrained(is_transcoder=params.train.target is not None),
        within(
            "counts",
            "fvu of the sae",
            "the SAE's FVU is below 1",
            "predicting the mean has an FVU of 1; here it is measured on images that training never saw",
            row="set",
            max_value=1,
            strict_max=True,
        ),
        within(
            "counts",
            "zero-shot changed by splicing",
            "splicing changes nothing by itself",
            "with the SAE's error added back, the model must do as well as without splicing; any difference would not be the SAE's fault",
            row="set",
            max_value=0.01,
        ),
        within(
            "counts",
            "fvu of the sae",
            "the SAE's FVU is above 0",
            "0 would be a perfect reconstruction of unseen activations, which means that something was compared with itself",
            row="set",
            min_value=0,
            strict_min=True,
        ),
        within(
            "counts",
            "dead share",
            "few latents are dead",
            f"a share of dead latents above evaluate.max_dead ({params.evaluate.max_dead:g}) means that the images are too few, or unlike "
            "those of training",
            row="set",
            max_value=params.evaluate.max_dead,
        ),
        within(
            "counts",
            "ms above floor",
            "monosemanticity is above its floor on average",
            "the floor is the score of uniform weights; a mean below it means that activations and embeddings are of different images",
            row="set",
            min_value=0,
            strict_min=True,
        ),
    ]


def _table_rules() -> list[Rule]:
    """Make the rules on the tables as a whole."""
    return [
        zero(
            "undefined",
            "values that are NaN",
            "no value is NaN",
            "undefined values must be null, so that averages and rankings skip them; a single NaN makes an average NaN and ranks first",
            row="table",
            first="first columns",
        ),
        zero(
            "sums",
            "difference",
            "counts add up",
            "one table counts what another one lists; a difference means that rows were lost or counted twice",
            row="of",
        ),
    ]


def _below_untrained(is_transcoder: bool) -> list[Rule]:
    """Make the rules on FVU. Beside a transcoder there is no untrained SAE that decodes the same, so only its own FVU must exist."""
    if is_transcoder:
        return [filled("counts", "fvu of the sae", "the FVU is a number", "the next check would let NaN pass", row="set")]
    return [
        filled("counts", "fvu below untrained", "both FVUs are numbers", "the next two checks would let NaN pass", row="set"),
        within(
            "counts",
            "fvu below untrained",
            "FVU is below the untrained SAE's",
            "otherwise training did nothing for reconstruction",
            row="set",
            min_value=0,
            strict_min=True,
        ),
    ]
