"""The page of a feature: its name beside its controls, its images, where it fires, and what is like it."""

from collections.abc import Callable, Mapping, Sequence, Set
from operator import itemgetter
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response

from ommatid.catalog.question import Question
from ommatid.explorer.audit import find_suspicious
from ommatid.explorer.cards import load_features, load_features_of_others, load_images, load_previews
from ommatid.explorer.heat import Tile, draw_svg, encode, make_tile
from ommatid.explorer.reviewed import make_box
from ommatid.explorer.steer_box import N_CHOICES, SteerQuery, make_steer_box
from ommatid.explorer.web import Json, NotFound, TheExplorer, View, feature_url
from ommatid.show.doses import ALL_ARMS, DOSES, STATUSES_IN_WORDS, draw_doses, find_outcome
from ommatid.show.numbers import fixed
from ommatid.show.svg import draw_histogram

router = APIRouter()

N_BINS = 40
"""Bins of the histogram of activations."""
N_CLASSES = 12
"""Classes shown of a feature."""
N_STRONGEST = 16
"""Images at the top of the page; they are those on which purity and uniqueness rest."""
DECILE_BOX = 72
"""Longest side of the images of a decile, in pixels."""
N_NEAREST = 4
"""Latents with the nearest directions whose images are hard negatives."""
N_PREVIEW = 2
"""Images shown of a latent that is like this one."""
N_MATCHES = 24
"""Other SAEs whose nearest latents are shown."""
N_SILENT = 8
"""Images of nearest features shown on which the feature itself is silent."""

_FEATURE = "SELECT * FROM features WHERE latent = $latent"
_NEAR = """
    SELECT latent, label FROM features WHERE sae = $sae ORDER BY abs(latent - $latent), latent LIMIT 5
"""
_JUDGED = "SELECT judge, ms, ms_low, ms_high, floor FROM judged WHERE sae = $sae AND dictionary = 'sae' AND latent = $latent"
_EXAMPLES = """
    SELECT decile, rank, act, heat, rows, cols, image FROM examples WHERE sae = $sae AND latent = $latent
"""
_NEAR_MISSES = "SELECT rank, image, margin, closeness FROM near_misses WHERE sae = $sae AND latent = $latent"
_FIRED = "SELECT list(image) AS images, list(act) AS acts FROM firings WHERE sae = $sae AND latent = $latent"
_ALIKE = """
    SELECT 'neighbours' AS kind, rank, other AS latent, cosine, NULL AS lift, NULL AS jaccard, NULL AS n_both
    FROM neighbours WHERE sae = $sae AND latent = $latent
    UNION ALL
    SELECT 'cofiring', rank, other, NULL, lift, jaccard, n_both FROM cofiring WHERE sae = $sae AND latent = $latent
"""
_MATCHES = "SELECT other_sae, other_latent, cosine, jaccard FROM matches WHERE sae = $sae AND latent = $latent"
_DOES = """
    SELECT sae, latent, causal, effect, effect_low, effect_high, best_control, dose, attribution
    FROM features WHERE latent IN (SELECT unnest($latents::INTEGER[]))
"""
_RUNS = "SELECT sae, name, decision FROM runs"
_LABELS = "SELECT * FROM labels WHERE sae = $sae AND latent = $latent"
_MISTAKES = """
    SELECT labeller, kind, rank, cosine, threshold, is_hard, act, image FROM mistakes
    WHERE sae = $sae AND latent = $latent
"""


_PARTS = {
    "feature": _FEATURE,
    "judged": _JUDGED,
    "labels": _LABELS,
    "examples": _EXAMPLES,
    "near_misses": _NEAR_MISSES,
    "mistakes": _MISTAKES,
    "fired": _FIRED,
    "alike": _ALIKE,
    "matches": _MATCHES,
}
"""Questions about a latent."""
_ORDERS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "judged": itemgetter("judge"),
    "labels": itemgetter("place", "labeller"),
    "examples": lambda row: (-row["decile"], row["rank"]),
    "near_misses": itemgetter("rank"),
    "mistakes": itemgetter("labeller", "kind", "rank"),
    "alike": itemgetter("rank"),
    "matches": lambda row: (-row["cosine"], row["other_sae"]),
}
"""Order of the rows of the answers."""


def find_feature(view: View, sae: str, latent: int) -> dict[str, Any]:
    """Return the row of `features` of a latent.

    Raises:
        NotFound: There is no such latent.
    """
    rows = view.rows(_FEATURE, latent=latent) if 0 <= latent < 2**31 else []
    found = [row for row in rows if row["sae"] == sae]  # a condition on the SAE would keep DuckDB from using the index of the latents
    if not found:
        near = view.rows(_NEAR, sae=sae, latent=min(max(latent, 0), 2**31 - 1))
        last = view.opened.saes[sae]["n_latents"] - 1
        names = {f"{row['latent']}: {row['label'] or 'without a name'}": feature_url(sae, row["latent"]) for row in near}
        raise NotFound(f"There is no latent {latent} in {sae}; its latents are 0 to {last:,}.", names)
    return found[0]


def describe_feature(view: View, sae: str, latent: int) -> dict[str, Any]:
    """Collect everything that the catalogue says of a feature, as its page and the JSON API show it."""
    keys = {"sae": sae, "latent": latent}
    found = view.opened.rows_of(_PARTS, **keys) if 0 <= latent < 2**31 else {}
    feature = next((row for row in found.get("feature", ()) if row["sae"] == sae), None) or find_feature(view, sae, latent)
    for name, order in _ORDERS.items():  # here, as that takes DuckDB a third of the time of such a question
        found[name].sort(key=order)
    alike, matches, (fired,) = found["alike"], found["matches"], found["fired"]
    others = {row["latent"] for row in alike}
    cards, strongest = load_features(view, sae, others), load_previews(view, sae, others)
    matched = load_features_of_others(view, [(row["other_sae"], row["other_latent"]) for row in matches[:N_MATCHES]])
    # catalogues that were published by older versions do not say what latents do
    asked = view.rows(_DOES, latents=sorted(others)) if "attribution" in feature else []
    does = {other: {"causal": "untested"} for other in others} | {row["latent"]: row for row in asked if row["sae"] == sae}
    nearest = [row["latent"] for row in alike if row["kind"] == "neighbours"][:N_NEAREST]
    shown = {
        **{name: found[name] for name in ("examples", "near_misses", "mistakes")},
        "silent": _find_silent(nearest, strongest, set(fired["images"] or ())),
    }
    previews = {other: images[:N_PREVIEW] for other, images in strongest.items()}
    numbers = {row["image"] for rows in shown.values() for row in rows} | {image for images in previews.values() for image in images}
    images = load_images(view, numbers)
    return {
        "feature": feature,
        "judged": found["judged"],
        "labels": found["labels"],
        "histogram": _count_acts(fired["acts"] or []),
        "classes": _describe_classes(view, fired["images"] or [], fired["acts"] or []),
        "doses": view.rows(DOSES, **keys) if feature.get("causal") not in (None, "untested") else [],
        "matches": [_describe_match(view, row, matched) for row in matches[:N_MATCHES]],
        **{name: [row | images[row["image"]] for row in rows if row["image"] in images] for name, rows in shown.items()},
        **{
            kind: [cards[row["latent"]] | does[row["latent"]] | row for row in alike if row["kind"] == kind and row["latent"] in cards]
            for kind in ("neighbours", "cofiring")
        },
        "previews": {other: [images[image] for image in found if image in images] for other, found in previews.items()},
    }


def _find_silent(nearest: Sequence[int], strongest: Mapping[int, Sequence[int]], fired: Set[int]) -> list[dict[str, Any]]:
    """Find images that fire the nearest latents most, but not this one."""
    firing_other = {image: other for other in reversed(nearest) for image in reversed(strongest.get(other, ())[:6])}
    silent = [{"image": image, "other": other} for image, other in reversed(firing_other.items()) if image not in fired]
    return silent[:N_SILENT]


def _count_acts(acts: Sequence[float]) -> list[dict[str, Any]]:
    """Count the activations in each bin between the smallest and the largest; bins without any are left out."""
    if not acts:
        return []
    low, high = min(acts), max(acts)
    counts, _ = np.histogram(acts, N_BINS, (low, high)) if high > low else ([len(acts)], None)
    return [{"bin": bin_, "n": int(n), "low": low, "high": high} for bin_, n in enumerate(counts) if n]


def _describe_match(view: View, match: dict[str, Any], others: Mapping[tuple[str, int], dict[str, Any]]) -> dict[str, Any]:
    """Add to a match what the catalogue says of the other SAE and of its latent."""
    run = next((run for run in view.opened.kept(_RUNS) if run["sae"] == match["other_sae"]), {"name": None, "decision": None})
    other = others.get((match["other_sae"], match["other_latent"]), {"label": None, "ms": None})
    return match | {"label": other["label"], "ms": other["ms"], "name": run["name"], "decision": run["decision"]}


def _describe_classes(view: View, images: Sequence[int], acts: Sequence[float]) -> list[dict[str, Any]]:
    """Describe on which classes a latent fires, the most common first.

    Args:
        view: The request.
        images: Evaluation images on which it fires.
        acts: Its activation on each.

    Returns:
        For each class its label, the number of images `n`, the mean activation `strength`, the `share` of the images on which the latent
        fires, the `coverage` of the class, and the `lift`: the share relative to that of the class among all images.
    """
    classes = view.opened.classes
    numbers, codes = np.asarray(images, np.int64), np.full(len(images), -1)
    is_known = numbers < len(classes.codes)
    codes[is_known] = classes.codes[numbers[is_known]]
    has_class = codes >= 0
    counts = np.bincount(codes[has_class], minlength=len(classes.names))
    sums = np.bincount(codes[has_class], np.asarray(acts, np.float64)[has_class], len(classes.names))
    n_all, n_images = int(counts.sum()), sum(classes.sizes)
    found = []
    for code in np.lexsort((np.arange(len(counts)), -counts))[:N_CLASSES]:
        if n := int(counts[code]):
            size = classes.sizes[code]
            row = {"label": classes.names[code], "n": n, "strength": float(sums[code]) / n, "share": n / n_all, "coverage": n / size}
            found.append(row | {"lift": n / n_all / (size / n_images)})
    return found


@router.get("/features/{sae}/{latent}", include_in_schema=False)
def feature_page(request: Request, explorer: TheExplorer, sae: str, latent: int) -> Response:
    """Show a feature."""
    with explorer.open(request) as view:
        sae = view.choose_sae(sae)
        found = describe_feature(view, sae, latent)
        feature = found["feature"]
        scale = feature["max_act"]
        strongest = [make_tile(row, scale) for row in found["examples"][:N_STRONGEST]]
        return view.render(
            "feature.html",
            sae,
            feature=feature,
            found=found,
            strongest=strongest,
            deciles=_by_decile(found["examples"][N_STRONGEST:], scale),
            near_misses=[make_tile(row, note=_distance(row)) for row in found["near_misses"]],
            silent=[(make_tile(row, note=f"fires {row['other']}"), row["other"]) for row in found["silent"]],
            mistakes=_by_labeller(found["mistakes"]),
            histogram=_draw_histogram(found["histogram"]),
            doses=draw_doses(found["doses"]),
            arms=ALL_ARMS,
            statuses=STATUSES_IN_WORDS,
            outcome=find_outcome(found["doses"]),
            steer_box=make_steer_box(view, sae, SteerQuery(latents=[latent]), strongest[:N_CHOICES]),
            tiles={other: [make_tile(row) for row in rows] for other, rows in found["previews"].items()},
            box=make_box(view, sae, latent),
            audited=[row for row in find_suspicious(view, sae) if row["latent"] == latent and row["n_tested"] is not None],
            sql=Question("SELECT * FROM features WHERE sae = $sae AND latent = $latent", {"sae": sae, "latent": latent}).text,
        )


@router.get("/api/features/{sae}/{latent}", tags=["features"])
def feature_json(request: Request, explorer: TheExplorer, sae: str, latent: int) -> Response:
    """Everything that the catalogue says of a feature."""
    with explorer.open(request) as view:
        sae = view.choose_sae(sae)
        return Json(describe_feature(view, sae, latent))


@router.get("/heat/{sae}/{latent}/{image}.svg", include_in_schema=False)
def heat_svg(request: Request, explorer: TheExplorer, sae: str, latent: int, image: int) -> Response:
    """Draw a heat map for browsers without JavaScript."""
    with explorer.open(request) as view:
        sql = """
            SELECT heat, e.rows, cols, max_act, seen_width, seen_height
            FROM examples AS e JOIN features USING (sae, latent) JOIN images USING (image)
            WHERE sae = $sae AND latent = $latent AND image = $image AND heat IS NOT NULL LIMIT 1
        """
        is_possible = 0 <= latent < 2**31 and 0 <= image < 2**31
        found = view.rows(sql, sae=view.choose_sae(sae), latent=latent, image=image) if is_possible else []
        if not found:
            raise NotFound(f"There is no heat map of latent {latent} on image {image}.")
        (row,) = found
        seen = (row["seen_width"] or 1, row["seen_height"] or 1)
        drawn = draw_svg(encode(row["heat"], row["max_act"]), row["rows"], row["cols"], seen)
        return Response(drawn, media_type="image/svg+xml", headers={"cache-control": "public, max-age=3600"})


def _by_decile(examples: list[dict[str, Any]], scale: float) -> list[tuple[int, list[Tile]]]:
    """Tiles of the examples that are not among the strongest images, by decile."""
    found: dict[int, list[Tile]] = {}
    for row in examples:
        if row["decile"] < 10:
            found.setdefault(row["decile"], []).append(make_tile(row, scale, DECILE_BOX))
    return list(found.items())


def _distance(near_miss: dict[str, Any]) -> str:
    """How far a near miss is from firing: as a share of the threshold, if the SAE has one."""
    share = near_miss["closeness"]
    return f"{-near_miss['margin']:.2g} below firing" if share is None else f"{100 * share:.0f} % of firing"


def _by_labeller(mistakes: list[dict[str, Any]]) -> dict[tuple[str, str], list[Tile]]:
    """Tiles of what each labeller's label got wrong, by labeller and kind."""
    found: dict[tuple[str, str], list[Tile]] = {}
    for row in mistakes:
        note = f"cosine {fixed(row['cosine'])}, needs {fixed(row['threshold'])}"
        found.setdefault((row["labeller"], row["kind"]), []).append(make_tile(row | {"heat": None}, note=note, box=84))
    return found


def _draw_histogram(rows: list[dict[str, Any]]) -> Any:
    if not rows:
        return None
    low, high = rows[0]["low"], rows[0]["high"]
    step = (high - low) / N_BINS
    bins = [(low + row["bin"] * step, low + (row["bin"] + 1) * step, row["n"]) for row in rows]
    return draw_histogram("Activations on the evaluation images on which it fires", "activation", bins)
