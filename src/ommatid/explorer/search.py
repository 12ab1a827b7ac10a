"""Search: one box for words, classes, captions, numbers and meaning, and a picture to search by."""

import re
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi import Query as Parameters
from fastapi.responses import Response
from pydantic import Field

from ommatid.explorer.features import load_features, load_tiles, previews
from ommatid.explorer.image import SaeField, Upload, read_upload
from ommatid.explorer.model import Model, about_model
from ommatid.explorer.security import check_form
from ommatid.explorer.web import Json, Query, TheExplorer, View

router = APIRouter()

N_HITS = 12
"""Hits shown of each kind."""
N_TILES = 4
"""Images shown of a feature."""
MOST_CAPTIONED = 64
"""Most images with a caption that matches whose features are counted."""

_BY_NAME = """
    SELECT latent FROM features WHERE sae = $sae AND contains(lower(label), $text)
    ORDER BY lower(label) <> $text, NOT regexp_matches(lower(label), $word), label_score - control_score DESC NULLS LAST, latent LIMIT $n
"""
_BY_LABELLER = """
    SELECT latent FROM (SELECT latent, labeller, score FROM labels WHERE sae = $sae AND contains(lower(label), $text)) AS other
    JOIN features USING (latent) WHERE features.sae = $sae AND features.labeller <> other.labeller
    GROUP BY latent ORDER BY max(score) DESC NULLS LAST, latent LIMIT $n
"""
_BY_CLASS = """
    SELECT latent FROM class_latents WHERE sae = $sae AND class IN (SELECT unnest($classes::VARCHAR[]))
    GROUP BY latent ORDER BY max(recall * precision) DESC, latent LIMIT $n
"""
_CLASSES = "SELECT label AS class, count(*) AS n FROM images WHERE label IS NOT NULL GROUP BY label ORDER BY n DESC, label"
_LABELLERS = "SELECT count(DISTINCT labeller) AS n FROM labels WHERE sae = $sae"
_HAS_CAPTIONS = "SELECT bool_or(len(captions) > 0) AS has FROM images"
_CAPTIONED = f"""
    SELECT image FROM images WHERE split = 'eval' AND len(list_filter(captions, lambda one: contains(lower(one), $text))) > 0
    ORDER BY image LIMIT {MOST_CAPTIONED}
"""
_OF_IMAGES = """
    SELECT latent FROM image_latents WHERE sae = $sae AND image IN (SELECT unnest($images::INTEGER[])) AND rank <= 8
    GROUP BY latent ORDER BY count(*) DESC, latent LIMIT $n
"""
_NEIGHBOURS = "SELECT other AS latent FROM neighbours WHERE sae = $sae AND latent = $latent ORDER BY rank LIMIT $n"
_BY_MEANING = "By meaning: the image against the mean of each feature's images, in the model's space of images and texts."


class SearchQuery(Query):
    """What to search for."""

    q: Annotated[str, Field(max_length=200)] = ""
    """Words, a class, or the number of a latent or an image."""


def find_words(view: View, sae: str, q: str) -> list[dict[str, Any]]:
    """Search the catalogue's texts, without the model.

    Args:
        view: The request.
        sae: The SAE.
        q: What was typed.

    Returns:
        For each kind of hit its title, what kind of match it is, and the features.
    """
    text = " ".join(q.lower().split())
    if not text:
        return []
    keys = {"sae": sae, "n": N_HITS}
    groups: list[tuple[str, str, list[dict[str, Any]]]] = []
    if text.isdecimal() and int(text) < view.opened.saes[sae]["n_latents"]:
        latent = int(text)
        groups.append(("Number", f"Latent {latent}.", [{"latent": latent}]))
        groups.append(("Neighbours", f"The directions most like that of latent {latent}.", view.rows(_NEIGHBOURS, **keys, latent=latent)))
    word = rf"\b{re.escape(text)}\b"
    people = [{"latent": latent} for latent in view.reviewed(sae).named_like(text)[:N_HITS]]
    groups.append(("Names by people", f"The name that a person gave contains “{text}”.", people))
    named = [row for row in view.rows(_BY_NAME, **keys, text=text, word=word) if not view.named(sae, row["latent"])]
    groups.append(("Names", f"The name contains “{text}”.", named))
    if view.opened.kept(_LABELLERS, sae=sae)[0]["n"] > 1:
        meaning = "A labeller whose name is not the best gave one that contains it."
        groups.append(("Other names", meaning, view.rows(_BY_LABELLER, **keys, text=text)))
    if classes := [row["class"] for row in find_classes(view, text)]:
        groups.append(("Classes", "They tell a class whose name contains it.", view.rows(_BY_CLASS, **keys, classes=classes)))
    if view.opened.kept(_HAS_CAPTIONS)[0]["has"] and (captioned := [row["image"] for row in view.rows(_CAPTIONED, text=text)]):
        n = len(captioned)
        which = f"the first {n} images" if n == MOST_CAPTIONED else f"{n} image{'s' if n != 1 else ''}"
        meaning = f"They are most often among the 8 strongest on {which} with a caption that contains it."
        groups.append(("Captions", meaning, view.rows(_OF_IMAGES, **keys, images=captioned)))
    features = load_features(view, sae, sorted({row["latent"] for _, _, rows in groups for row in rows}))
    found = [
        {"title": title, "text": meaning, "rows": [features[row["latent"]] for row in rows], "images": []}
        for title, meaning, rows in groups
        if rows
    ]
    if text.isdecimal() and (tiles := load_tiles(view, [min(int(text), 2**31 - 1)])):
        found.insert(0, {"title": "Image", "text": f"Image {int(text)}.", "rows": [], "images": list(tiles.values())})
    return found


def find_classes(view: View, text: str) -> list[dict[str, Any]]:
    """Find classes whose name contains a text in lower case, and count their images."""
    return [row for row in view.opened.kept(_CLASSES) if text in row["class"].lower()][:N_HITS]


def _among(n_images: int) -> str:
    return f"By meaning, among {n_images:,} evaluation images."


def find_meaning(view: View, sae: str, q: str, wait: float = 0) -> Model:
    """Search by meaning: the text against each feature's mean image embedding in the model's joint space."""
    text = "".join(c for c in q if c.isprintable())  # marks of the writing direction mean nothing to the model
    model = view.explorer.model
    return about_model(lambda: _name_hits(view, sae, model.search_text(sae, text, N_HITS, wait)) if text.strip() else [])


def _name_hits(view: View, sae: str, hits: Any) -> list[dict[str, Any]]:
    """The features of hits, best first, each with its score as `hit`."""
    rows = load_features(view, sae, list(hits.found))
    return [rows[latent] | {"hit": score} for latent, score in zip(hits.found, hits.scores, strict=True) if latent in rows]


@router.get("/search", include_in_schema=False)
def search_page(request: Request, explorer: TheExplorer, query: Annotated[SearchQuery, Parameters()]) -> Response:
    """Show what a search finds, and say which kind of match each hit is."""
    with explorer.open(request) as view:
        sae, q = view.choose_sae(query.sae), query.q.strip()
        groups = find_words(view, sae, q)
        meaning = find_meaning(view, sae, q) if q and not explorer.settings.is_static else None
        rows = [row for group in groups for row in group["rows"]] + ((meaning.answer or []) if meaning else [])
        classes = find_classes(view, q.lower()) if q else []
        tiles = previews(view, sae, (row["latent"] for row in rows), N_TILES)
        return view.render("search.html", sae, q=q, groups=groups, classes=classes, meaning=meaning, tiles=tiles, similar=None)


@router.post("/search", include_in_schema=False, dependencies=[Depends(check_form)])
def search_by_image(request: Request, explorer: TheExplorer, upload: Upload, sae: SaeField = None) -> Response:
    """Show the features and images that are most like an uploaded image, which is not kept."""
    with explorer.open(request) as view:
        sae, encoded = view.choose_sae(sae or None), read_upload(upload)

        def ask() -> list[dict[str, Any]]:
            hits = explorer.model.search_image(sae, encoded, N_HITS, wait=30)
            images = load_tiles(view, hits.images.found)
            shown = zip(hits.images.found, hits.images.scores, strict=True)
            tiles = [replace(images[image], note=f"cosine {score:.2f}") for image, score in shown if image in images]
            return [
                {
                    "title": "Fire on it",
                    "text": "By their activation on the image.",
                    "rows": _name_hits(view, sae, hits.by_activation),
                    "images": [],
                },
                {"title": "Of like meaning", "text": _BY_MEANING, "rows": _name_hits(view, sae, hits.by_meaning), "images": []},
                {"title": "Images like it", "text": hits.problem or _among(hits.n_images), "rows": [], "images": tiles},
            ]

        similar = about_model(ask)
        rows = [row for group in similar.answer or [] for row in group["rows"]]
        tiles = previews(view, sae, (row["latent"] for row in rows), N_TILES)
        return view.render("search.html", sae, q="", groups=similar.answer or [], classes=[], meaning=None, tiles=tiles, similar=similar)


@router.get("/api/search", tags=["search"])
def search_json(request: Request, explorer: TheExplorer, query: Annotated[SearchQuery, Parameters()]) -> Response:
    """What a search finds, by kind of match; `meaning` waits up to a minute for the model."""
    with explorer.open(request) as view:
        sae = view.choose_sae(query.sae)
        meaning = find_meaning(view, sae, query.q, wait=60)
        words = [group | {"images": [tile.image for tile in group["images"]]} for group in find_words(view, sae, query.q)]
        return Json({"words": words, "meaning": meaning.answer, "problem": meaning.problem})
