"""Search: one box for words, classes, captions, numbers and meaning, and a picture to search by."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi import Query as Parameters
from fastapi.responses import Response
from pydantic import Field

from ommatid.explorer.cards import load_features, load_tiles, previews
from ommatid.explorer.image import SaeField, Upload, read_upload
from ommatid.explorer.model import Model, about_model
from ommatid.explorer.security import check_form
from ommatid.explorer.texts import find_captioned, names, other_names
from ommatid.explorer.web import Json, Query, TheExplorer, View

router = APIRouter()

N_HITS = 8
"""Hits shown of each kind."""
N_TILES = 3
"""Images shown of a feature."""

_BY_CLASS = """
    SELECT latent FROM class_latents WHERE sae = $sae AND class IN (SELECT unnest($classes::VARCHAR[]))
    GROUP BY latent ORDER BY max(recall * precision) DESC, latent LIMIT $n
"""
_CLASSES = "SELECT label AS class, count(*) AS n FROM images WHERE label IS NOT NULL GROUP BY label ORDER BY n DESC, label"
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
    classes = [row["class"] for row in find_classes(view, text)]
    latent = int(text) if text.isdecimal() and int(text) < view.opened.saes[sae]["n_latents"] else None
    groups: list[tuple[str, str, Sequence[int]]] = []
    if latent is not None:
        groups.append(("Number", f"Latent {latent}.", [latent]))
        near = [row["latent"] for row in view.rows(_NEIGHBOURS, sae=sae, latent=latent, n=N_HITS)]
        groups.append(("Neighbours", f"The directions most like that of latent {latent}.", near))
    groups.append(("Names by people", f"The name that a person gave contains “{text}”.", view.reviewed(sae).named_like(text)[:N_HITS]))
    named = names(view.opened, sae).find(text, N_HITS)
    groups.append(("Names", f"The name contains “{text}”.", [found for found in named if not view.named(sae, found)]))
    others = other_names(view.opened, sae).find(text, N_HITS)
    groups.append(("Other names", "A labeller whose name is not the best gave one that contains it.", others))
    telling = [row["latent"] for row in view.rows(_BY_CLASS, sae=sae, classes=classes, n=N_HITS)] if classes else []
    groups.append(("Classes", "They tell a class whose name contains it.", telling))
    captioned = find_captioned(view.opened, sae, text, N_HITS)
    groups.append(("Captions", f"Captions of their strongest images contain “{text}”.", list(captioned)))
    features = load_features(view, sae, {latent for _, _, latents in groups for latent in latents})
    found = [
        {"title": title, "text": meaning, "rows": [features[latent] for latent in latents], "images": []}
        for title, meaning, latents in groups
        if latents
    ]
    if captioned:
        found[-1]["rows"] = [row | {"n_captioned": captioned[row["latent"]]} for row in found[-1]["rows"]]
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
