"""The page that compares two SAEs: numbers beside their controls, and which features are kept, split, changed, lost and new."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from fastapi import Query as Parameters
from fastapi.responses import Response
from pydantic import Field

from ommatid.catalog.identity import ALIKE, COUNTS, FOUND, KINDS, SAME
from ommatid.catalog.question import Question
from ommatid.explorer.cards import load_features, previews
from ommatid.explorer.web import BadRequest, Json, NotFound, Query, TheExplorer, View, link
from ommatid.show.about import About
from ommatid.show.numbers import DASH, count, fixed, in_order, interval, percent, signed

router = APIRouter()

N_TILES = 3
"""Images shown of a feature."""
N_PARTS = 4
"""Latents shown of those into which a feature is split."""
_PAIRS = """
    SELECT stability.*, runs.name AS other_name, runs.decision AS other_decision
    FROM stability LEFT JOIN runs ON runs.sae = stability.other_sae ORDER BY stability.sae, other_sae
"""
_NAMES = """
    SELECT
        sae, name, hookpoint, target, decision, decided_at, n_latents, fvu, l0, dead, ms, ms_floor, beats_control, label_score,
        control_score, params ->> '$.train.seed' AS seed
    FROM runs
"""
_LAYERS = """
    SELECT
        r.sae, r.name, r.hookpoint || coalesce(' to ' || r.target, '') AS place, r.fvu, r.ms - r.ms_floor AS over_floor,
        n.ms - n.ms_floor AS neurons, r.label_score, r.control_score, r.downstream_kl
    FROM runs AS r
    JOIN comparisons AS n ON n.sae = r.sae AND n.dictionary = 'neurons'
    WHERE (SELECT count(DISTINCT (hookpoint, target)) FROM runs JOIN comparisons USING (sae)) > 1
    ORDER BY place, over_floor DESC NULLS LAST, r.sae
"""
_ALIVE = """
    SELECT m.sae, count(*) AS n, count(*) FILTER (f.is_dead IS NOT true) AS n_alive
    FROM matches AS m LEFT JOIN features AS f ON f.sae = m.sae AND f.latent = m.latent
    WHERE (m.sae = $a AND m.other_sae = $b) OR (m.sae = $b AND m.other_sae = $a) GROUP BY m.sae
"""
_PARTS = f"""
    SELECT m.latent, m.other_latent, m.cosine FROM matches AS m LEFT JOIN features AS f ON f.sae = $b AND f.latent = m.latent
    WHERE m.sae = $b AND m.other_sae = $a AND f.is_dead IS NOT true AND m.cosine >= {ALIKE}
        AND m.other_latent IN (SELECT unnest($latents::INTEGER[]))
    ORDER BY m.other_latent, m.cosine DESC, m.latent
"""
_ROWS = """
    SELECT latent, other_latent, cosine, jaccard FROM matches
    WHERE sae = $mine AND other_sae = $theirs AND latent IN (SELECT unnest($latents::INTEGER[]))
"""
SORTS = {"ms": "ms DESC", "cosine": "cosine"}
"""SQL of each sort."""


class CompareQuery(Query):
    """Which SAEs are compared, and which of their features are shown."""

    a: Annotated[str | None, Field(max_length=500)] = None
    """The first SAE; left out: the champion before, or else the best of the catalogue."""
    b: Annotated[str | None, Field(max_length=500)] = None
    """The second SAE; left out: one with which the first is matched."""
    kind: Literal["kept", "split", "changed", "lost", "new"] = "kept"
    """Which features are listed."""
    sort: Literal["ms", "cosine"] = "ms"
    """ms: the most monosemantic first; cosine: the least alike first."""
    after: Annotated[int | None, Field(ge=0, le=2**31 - 1)] = None
    """Latent of the last feature on the page before."""
    n: Annotated[int, Field(ge=1, le=100)] = 8
    """Features on a page."""

    def url(self, path: str = "/compare", **changes: Any) -> str:
        """Address of this page with some parameters changed."""
        return link(path, **(self.model_dump(exclude_defaults=True, exclude={"sae"}) | changes))


def list_saes(view: View) -> dict[str, dict[str, Any]]:
    """Return what can be compared, by name: the SAEs of the catalogue, best first, then those that it only has matches with."""
    matched = {row["other_sae"] for row in view.opened.kept(_PAIRS)}
    known = {row["sae"]: row for row in view.opened.kept(_NAMES)}
    here = {sae: known[sae] | {"is_here": True} for sae in view.opened.saes}
    return here | {sae: known.get(sae, {"sae": sae, "name": None}) | {"is_here": False} for sae in sorted(matched - set(here))}


def choose_pair(view: View, query: CompareQuery) -> tuple[str, str | None]:
    """Choose two SAEs; the second is None if there is no other.

    Raises:
        NotFound: There is no SAE of a name.
        BadRequest: Both are the same.
    """
    saes = list_saes(view)
    partners: dict[str, list[str]] = {}
    for row in view.opened.kept(_PAIRS):
        partners.setdefault(row["sae"], []).append(row["other_sae"])
    a, b = _find(saes, query.a or query.sae, "a"), _find(saes, query.b, "b")
    if a is None and b is not None:
        a = next((sae for sae in (*partners.get(b, ()), *saes) if sae != b), b)
    elif a is None:
        before = [sae for sae, one in saes.items() if not one["is_here"] and one.get("decision") == "champion"]
        a = max(before, key=lambda sae: saes[sae]["decided_at"], default=next(iter(saes)))
    assert a is not None
    if b is None:
        near = [sae for sae in saes if sae in partners.get(a, ())]
        b = next((sae for sae in (*near, *saes) if sae != a), None)
    if a == b and len(saes) > 1:
        raise BadRequest(f"a, b: got {a!r} twice; choose two different ones of {', '.join(saes)}")
    return a, b if a != b else None


def _find(saes: Mapping[str, Mapping[str, Any]], name: str | None, side: str) -> str | None:
    if name is None:
        return None
    if found := next((sae for key in ("sae", "name") for sae, one in saes.items() if name in (sae, one[key])), None):
        return found
    near = difflib.get_close_matches(name, saes, n=3, cutoff=0.2) or list(saes)[:3]
    raise NotFound(f"{side}: there is no SAE {name!r} to compare.", {sae: link("/compare", **{side: sae}) for sae in near})


def list_numbers(view: View, one: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """List the headline numbers of an SAE, each with what to compare it with, by name."""
    if not one["is_here"]:
        over_floor = one["ms"] - one["ms_floor"] if one.get("ms") is not None and one.get("ms_floor") is not None else None
        return {
            "hookpoint": (_place(one), ""),
            "latents": (count(one.get("n_latents")), ""),
            "MS − floor": (signed(over_floor), "as its own catalogue had it"),
            "variance unexplained (FVU)": (fixed(one.get("fvu")), ""),
            "latents per token (L0)": (_one_decimal(one.get("l0")), ""),
            "dead latents": (percent(one.get("dead")), ""),
            "names over their control": (percent(one.get("beats_control")), "50 % by chance"),
            "label score": (fixed(one.get("label_score")), ""),
        }
    key = ("compare", one["sae"])
    if key not in view.opened.cache:
        about = About(view.opened.catalog, one["sae"])
        own, controls = about.numbers, about.controls
        others = [("untrained", "untrained SAE"), ("neurons", "raw neurons")]
        beside = "; ".join(f"{title} {signed(controls[name]['above_floor'])}" for name, title in others if name in controls)
        untrained = controls.get("untrained")
        view.opened.cache[key] = {
            "hookpoint": (_place(one), ""),
            "latents": (count(own["n_latents"]), ""),
            "MS − floor": (signed(own["above_floor"]), f"95 % interval {interval(own['low'], own['high'], signed)}; {beside}"),
            "variance unexplained (FVU)": (fixed(own["fvu"]), f"untrained SAE {fixed(untrained['fvu'])}" if untrained else ""),
            "latents per token (L0)": (_one_decimal(own["l0"]), ""),
            "dead latents": (percent(own["dead"]), ""),
            "names over their control": (percent(one["beats_control"]), "50 % by chance"),
            "label score": (fixed(one["label_score"]), f"another latent's label {fixed(one['control_score'])}"),
        }
    return view.opened.cache[key]


def _place(one: Mapping[str, Any]) -> str:
    """Hookpoint that an SAE encodes and, for a transcoder, the one that it decodes."""
    return " to ".join(name for name in (one.get("hookpoint"), one.get("target")) if name) or DASH


def _one_decimal(value: float | None) -> str:
    return DASH if value is None else f"{value:.1f}"


def find_pairs(view: View, a: str, b: str, query: CompareQuery) -> tuple[list[dict[str, Any]], int | None, str]:
    """Find a page of features of a kind.

    Returns:
        The features, the latent after which the next page begins or None, and the SQL behind the list.

    Raises:
        BadRequest: The page is to begin after a latent that is not of the kind.
    """
    values = {"a": a, "b": b, "kind": query.kind}
    sql = f"{FOUND}    SELECT * FROM found WHERE kind = $kind ORDER BY {SORTS[query.sort]} NULLS LAST, latent"
    ordered = _order(view, sql, values)
    first = 0
    if query.after is not None:
        found = np.flatnonzero(ordered == query.after)
        if not len(found):
            raise BadRequest(f"after: got {query.after}; expected a latent that is {query.kind}, as the links to other pages have it")
        first = int(found[0]) + 1
    latents = ordered[first : first + query.n].tolist()
    mine, theirs = (b, a) if query.kind == "new" else (a, b)
    rows = {row["latent"]: row for row in view.rows(_ROWS, mine=mine, theirs=theirs, latents=latents)} if latents else {}
    parts: dict[int, list[dict[str, Any]]] = {}
    if query.kind == "split" and latents:
        for row in view.rows(_PARTS, a=a, b=b, latents=latents):
            parts.setdefault(row["other_latent"], []).append({"latent": row["latent"], "cosine": row["cosine"]})
    for latent, row in rows.items():
        row["others"] = parts.get(latent, [{"latent": row["other_latent"], "cosine": row["cosine"]}])
    following = latents[-1] if first + query.n < len(ordered) else None
    return [rows[latent] for latent in latents], following, Question(f"{sql}\n    LIMIT {query.n}", values).text


def _order(view: View, sql: str, values: Mapping[str, str]) -> np.ndarray:
    """Latents of a kind in their order, int32. The order is kept while the catalogue is open, as to find it takes all matches."""
    key = (sql, *values.values())
    if key not in view.opened.cache:
        answer = view.opened.ask(Question(f"SELECT latent FROM ({sql})", values))
        view.opened.cache[key] = np.array([latent for (latent,) in answer.rows], np.int32)
    return view.opened.cache[key]


def compare(view: View, query: CompareQuery) -> dict[str, Any]:
    """Compare two SAEs; without a second one, or without their matches, only their numbers."""
    a, b = choose_pair(view, query)
    saes = list_saes(view)
    sides = [saes[sae] for sae in (a, b) if sae]
    pairs = {(row["sae"], row["other_sae"]): row for row in view.opened.kept(_PAIRS)}
    found: dict[str, Any] = {
        "a": a,
        "b": b,
        "numbers": [list_numbers(view, side) for side in sides],
        "stability": [pairs[pair] for pair in ((a, b), (b, a)) if pair in pairs],
        "is_matched": (a, b) in pairs,
        "is_one_space": len(sides) < 2 or len({side.get("target") or side.get("hookpoint") for side in sides}) == 1,
        "layers": sorted(view.opened.kept(_LAYERS), key=lambda row: in_order(row["place"])),
        "is_same_seed": len(sides) > 1 and sides[0].get("seed") is not None and sides[0]["seed"] == sides[1].get("seed"),
        "kinds": KINDS,
        "counts": {},
        "alive": {},
        "features": [],
        "next": None,
        "sql": Question(_PAIRS).text,
    }
    if b and found["is_matched"]:
        rows, following, sql = find_pairs(view, a, b, query)
        found |= {
            "counts": dict.fromkeys(KINDS, 0) | {row["kind"]: row["n"] for row in view.opened.kept(COUNTS, a=a, b=b)},
            "alive": {row["sae"]: {"n": row["n"], "n_alive": row["n_alive"]} for row in view.opened.kept(_ALIVE, a=a, b=b)},
            "features": rows,
            "next": query.url(a=a, b=b, after=following) if following is not None else None,
            "sql": sql,
        }
    return found


@router.get("/compare", include_in_schema=False)
def compare_page(request: Request, explorer: TheExplorer, query: Annotated[CompareQuery, Parameters()]) -> Response:
    """Show two SAEs side by side."""
    with explorer.open(request) as view:
        found = compare(view, query)
        a, b, saes = found["a"], found["b"], list_saes(view)
        mine, theirs = (b, a) if query.kind == "new" else (a, b)
        rows = found["features"]
        others = [other["latent"] for row in rows for other in row["others"][:N_PARTS]]
        cards = {mine: _cards(view, mine, [row["latent"] for row in rows]), theirs: _cards(view, theirs, others)} if rows else {}
        return view.render(
            "compare.html",
            a if a in view.opened.saes else view.choose_sae(query.sae),
            sae_page="/compare",
            query=query,
            found=found,
            saes=saes,
            first=saes[a],
            second=saes[b] if b else None,
            mine=mine,
            theirs=theirs,
            cards=cards,
            n_parts=N_PARTS,
            same=SAME,
            alike=ALIKE,
        )


def _cards(view: View, sae: str | None, latents: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Features with their strongest images, by latent; empty if the catalogue does not have them."""
    features = load_features(view, sae, sorted(set(latents))) if sae else {}
    tiles = previews(view, sae, features, N_TILES) if sae else {}
    return {latent: {"row": row, "tiles": tiles[latent]} for latent, row in features.items()}


@router.get("/api/compare", tags=["compare"])
def compare_json(request: Request, explorer: TheExplorer, query: Annotated[CompareQuery, Parameters()]) -> Response:
    """Two SAEs of the same activations: numbers with their controls, stability, and features kept, split, changed, lost or new."""
    with explorer.open(request) as view:
        found = compare(view, query)
        return Json(found | {"next": found["next"] and found["next"].replace("/compare", "/api/compare", 1)})
