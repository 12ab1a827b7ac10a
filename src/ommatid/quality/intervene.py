"""Profile and rules of the stage `intervene`: a status agrees with its numbers, and the rule behind it rejects random latents."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from ommatid.config import Params
from ommatid.quality.base import SHOWN, Frames, Rule, files_of, filled, named, one_of, query, table_of, within, zero
from ommatid.schemas import (
    ARMS,
    AUDIT_GROUPS,
    AUDIT_STATUSES,
    N_ATTRIBUTED,
    N_AUDIT_IMAGES,
    OUTCOMES,
    PARTS,
    STATUSES,
)
from ommatid.store import Artefact

_NUMBERS = ("dose", "act", "effect", "effect_low", "effect_high", "best_control")
_LIES = "status disagrees with its numbers"


def profile(artefact: Artefact, params: Params) -> Frames:
    """Make the frames `effects` (one row for each latent), `tables` (one for each other table) and `counts` (one row)."""
    effects = table_of(artefact, "effects", ["latent", "status", "reason", "outcome", *_NUMBERS])
    effects[_LIES] = [_lie(row) for row in effects.to_dict("records")]
    d_sae, times = params.train.d_sae, Counter(effects["latent"].tolist())
    odd = sorted(set(range(d_sae)) ^ times.keys() | {latent for latent, n in times.items() if n > 1})
    summary, n_tested = artefact.summary, sum(status != "untested" for status in effects["status"])
    shares = {key: summary.get(key) for key in ("share_causal", "random_causal")}
    counts = {
        "set": "all latents",
        "latents missing or repeated": len(odd),
        "first missing": named([f"latent {n}" for n in odd[:SHOWN]]),
        "change by an edit of nothing": summary.get("zero_dose") if n_tested else 0.0,
        "counts that disagree": named([key for key, n in _counts(effects).items() if summary.get(key) != n]),
        "shares outside 0 to 1": named([f"{key} {share:g}" for key, share in shares.items() if share is not None and not 0 <= share <= 1]),
        "random latents beyond chance": _beyond_chance(shares["random_causal"], n_tested),
        "first random": named([f"{shares['random_causal']:.3g} of {n_tested} are causal"] if shares["random_causal"] else []),
    }
    counts["audit counts that disagree"] = named(_odd_audit(artefact))
    tables = [_table(artefact, table, d_sae) for table in _KEYS]
    return {"effects": effects, "tables": pd.DataFrame(tables), "counts": pd.DataFrame([counts])}


def _counts(effects: pd.DataFrame) -> dict[str, int]:
    of = Counter(effects["status"])
    return {"n_tested": len(effects) - of["untested"], **{f"n_{status}": of[status] for status in STATUSES}}


def _odd_audit(artefact: Artefact) -> list[str]:
    """Return the counts of `audits` that its other numbers or the rows of `audit` contradict."""
    counted = ("n_pairs", "n_too_few", "n_examined", "n_unlisted", "n_tested", "n_suspects")
    rows = table_of(artefact, "audits", [*counted]).to_dict("records")
    if len(rows) != 1:
        return [f"{len(rows)} rows of audits"]
    (row,) = rows
    of = Counter(table_of(artefact, "audit", ["status"])["status"])
    expected = {
        "n_examined": sum(of.values()) + row["n_unlisted"],
        "n_pairs": row["n_examined"] + row["n_too_few"],
        "n_tested": of["suspect"] + of["unconfirmed"],
        "n_suspects": of["suspect"],
    }
    return [name for name, n in expected.items() if row[name] != n]


def _lie(row: dict[str, Any]) -> str:
    """Return in what way a row of `effects` contradicts itself; empty if it does not."""
    numbers = [float("nan") if row[name] is None else float(row[name]) for name in _NUMBERS]
    dose, act, effect, low, high, control = numbers
    if row["status"] == "untested":
        known = [name for name, value in zip(_NUMBERS, numbers, strict=True) if not math.isnan(value)]
        known += ["outcome"] if not pd.isna(row["outcome"]) else []
        return f"untested, but with {known[0]}" if known else "untested without a reason" if pd.isna(row["reason"]) else ""
    if not pd.isna(row["reason"]):
        return "tested, but with a reason why not"
    if row["outcome"] not in OUTCOMES:
        return f"outcome {row['outcome']}"
    if missing := [name for name, value in zip(_NUMBERS, numbers, strict=True) if not math.isfinite(value)]:
        return f"{missing[0]} is not a number"
    if dose < 0 or act < 0:
        return "a dose below 0"
    if low > high:
        return f"effect_low {low:g} above effect_high {high:g}"
    if row["status"] == "causal" and not low > control >= 0:
        return f"causal, with effect {effect:g} from {low:g} and best_control {control:g}"
    return ""


_KEYS = {
    "interventions": "latent, outcome, arm, dose",
    "attributions": "output, rank",
    "audit": "latent, class",
    "audit_images": "latent, class, part, rank",
}
_SHARES = ("accuracy_with", "accuracy_without", "mistaken_with", "trust_with", "trust_without", "worst", "worst_ablated", "balanced")
_FAULTS = {
    "interventions": f"""
        NOT (arm IN {ARMS} AND outcome IN {OUTCOMES} AND isfinite(value) AND isfinite(dose) AND dose >= 0)
        OR coalesce(low > high, false) OR n_images < 1 OR n_draws < 1
    """,
    "attributions": f"""
        NOT (rank BETWEEN 1 AND {N_ATTRIBUTED} AND isfinite(effect) AND coalesce(isfinite(exact), true) AND isfinite(sparsity))
        OR n_images < 1
    """,
    "audit": f"""
        NOT (status IN {AUDIT_STATUSES} AND isfinite(suspicion) AND isfinite(lift))
        OR least(n_with, n_without, n_others_with, n_others_without) < 1
        OR {" OR ".join(f"coalesce({name} NOT BETWEEN 0 AND 1, false)" for name in _SHARES)}
        OR accuracy_more_low > accuracy_more_high OR mistaken_more_low > mistaken_more_high OR trust_less_low > trust_less_high
        OR (status = 'unsuspicious') <> (suspicion <= 0)
        OR (status IN ('suspect', 'unconfirmed')) <> (n_tested IS NOT NULL AND worst_group IN {AUDIT_GROUPS})
        OR (status = 'untested') <> (reason IS NOT NULL)
        OR (n_tested IS NOT NULL AND (status = 'suspect') <> coalesce(gain_low > 0, false))
    """,
    "audit_images": f"NOT (part IN {PARTS} AND rank BETWEEN 1 AND {N_AUDIT_IMAGES})",
}


def _table(artefact: Artefact, table: str, d_sae: int) -> dict[str, Any]:
    """Make the row of the frame `tables` that counts and names the rows of a table with a fault, or with a key that another row has."""
    files, keys = files_of(artefact, table), _KEYS[table].split(", ")
    key = " || ' ' || ".join(["'latent ' || latent", *(name for name in keys if name != "latent")])
    found = {
        "faulty rows": f"SELECT {key} FROM {{}} WHERE {_FAULTS[table]} OR latent NOT BETWEEN 0 AND {d_sae - 1}",
        "repeated keys": f"SELECT min({key}) FROM {{}} GROUP BY {_KEYS[table]} HAVING count(*) > 1",
    }
    if table == "attributions":
        found["rows out of order"] = (
            f"SELECT {key} FROM (SELECT *, lag(rank, 1, 0) OVER ranked AS above, lag(abs(effect)) OVER ranked AS larger FROM {{}} "
            "WINDOW ranked AS (PARTITION BY output ORDER BY rank, abs(effect) DESC)) "
            "WHERE rank > above + 1 OR (isfinite(effect) AND abs(effect) > larger)"
        )
    row: dict[str, Any] = {"table": table, "rows out of order": 0, "first out of order": ""}
    for name, sql in found.items():
        places = sorted(place for (place,) in query(sql, files))
        row |= {name: len(places), f"first {name.removeprefix('rows ')}": named(places[:SHOWN])}
    return row


_CHANCE = 0.05
"""Share of random latents that an interval of 95 % lets pass as causal."""
_RARE = 0.001
"""Probability below which it is not chance that more than that pass."""


def _beyond_chance(share: float | None, n: int) -> float:
    """Return by how much a share of n latents exceeds the largest that chance allows: a share that is not rare if _CHANCE of them pass."""
    if not share or not n:
        return 0.0
    # the probability that at least `k` of n pass, for every k; in logarithms, as the terms of a thousand latents are out of range
    terms = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)]
    log_p = np.array([term + k * math.log(_CHANCE) + (n - k) * math.log1p(-_CHANCE) for k, term in enumerate(terms)])
    at_least = np.exp(log_p)[::-1].cumsum()[::-1]
    return max(0.0, share - float(np.flatnonzero(at_least >= _RARE).max()) / n)


def rules(params: Params) -> list[Rule]:
    """Make the rules under which statuses can be trusted."""
    return [*_effect_rules(), *_table_rules(), *_summary_rules()]


def _effect_rules() -> list[Rule]:
    return [
        zero(
            "counts",
            "latents missing or repeated",
            "every latent has one row of effects",
            "a latent that was not tested has a row whose reason says why",
            row="set",
            first="first missing",
        ),
        one_of(
            "effects",
            "status",
            list(STATUSES),
            "every status is known",
            "pages and queries distinguish what a latent does by it",
            row="latent",
        ),
        one_of(
            "effects",
            _LIES,
            [""],
            "statuses agree with their numbers",
            "a latent is causal only if its effect lies above 0 and above every control, and one that is untested has no numbers",
            row="latent",
        ),
    ]


def _table_rules() -> list[Rule]:
    return [
        zero(
            "tables",
            "faulty rows",
            "rows have known latents, arms, outcomes and ranks, and finite numbers",
            "pages draw each arm as a line beside the others",
            row="table",
            first="first faulty rows",
        ),
        zero(
            "tables",
            "repeated keys",
            "no key is repeated",
            "a point of a curve would have two values",
            row="table",
            first="first repeated keys",
        ),
        zero(
            "tables",
            "rows out of order",
            "attributions are ranked by size without gaps",
            "the first are read as those that matter most",
            row="table",
            first="first out of order",
        ),
    ]


def _summary_rules() -> list[Rule]:
    return [
        filled(
            "counts",
            "change by an edit of nothing",
            "an edit that moves nothing was tried",
            "the next check needs what it changed",
            row="set",
        ),
        zero(
            "counts",
            "change by an edit of nothing",
            "an edit that moves nothing changes nothing",
            "otherwise running the model again is itself an effect, and every number contains it",
            row="set",
        ),
        one_of(
            "counts",
            "counts that disagree",
            [""],
            "the summary counts the statuses",
            "MLflow and the pages of a run show its numbers",
            row="set",
        ),
        one_of(
            "counts",
            "audit counts that disagree",
            [""],
            "the audit counts what it lists",
            "people read from it how much was looked at, and how much was left out",
            row="set",
        ),
        one_of(
            "counts",
            "shares outside 0 to 1",
            [""],
            "shares lie between 0 and 1",
            "they are shares of latents",
            row="set",
        ),
        within(
            "counts",
            "random latents beyond chance",
            "random latents are not causal",
            f"the rule that makes a latent causal must reject one that was picked at random, save {_CHANCE:.0%} and what chance adds",
            row="set",
            first="first random",
            max_value=0,
        ),
    ]
