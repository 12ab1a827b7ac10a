"""Search: one box for words, classes, captions, numbers and meaning, and a picture to search by."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi import Query as Parameters
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from ommatid.explorer.features import previews, scales
from ommatid.explorer.heat import make_tile
from ommatid.explorer.image import Upload, read_upload
from ommatid.explorer.model import Model, about_model
from ommatid.explorer.security import check_form
from ommatid.explorer.web import Query, TheExplorer, View

router = APIRouter()

N_HITS = 12
"""Hits shown of each kind."""
N_TILES = 4
"""Images shown of a feature."""

_BY_NAME = """
    SELECT * FROM features WHERE sae = $sae AND contains(lower(label), $text)
    ORDER BY lower(label) <> $text, NOT starts_with(lower(label), $text), label_score - control_score DESC NULLS LAST, latent LIMIT $n
"""
_BY_LABELLER = """
    SELECT features.*, other.label AS other_label, other.labeller AS other_labeller FROM labels AS other JOIN features USING (sae, latent)
    WHERE other.sae = $sae AND contains(lower(other.label), $text) AND other.label IS DISTINCT FROM features.label
    ORDER BY other.score DESC NULLS LAST, latent LIMIT $n
"""
_BY_CLASS = """
    SELECT * FROM features WHERE sae = $sae AND len(list_filter(top_classes[:1], lambda one: contains(lower(one), $text))) > 0
    ORDER BY purity DESC NULLS LAST, n_images DESC, latent LIMIT $n
"""
_CLASSES = """
    SELECT label AS class, count(*) AS n FROM images WHERE contains(lower(label), $text) GROUP BY label ORDER BY n DESC, label LIMIT $n
"""
_CAPTIONED = """
    SELECT image, left(image_id, 12) AS hash, width, height, label FROM images
    WHERE contains(lower(array_to_string(captions, chr(10))), $text) ORDER BY split <> 'eval', image LIMIT 200
"""
_OF_IMAGES = """
    WITH found AS (
        SELECT latent, count(*) AS n FROM examples
        WHERE sae = $sae AND image IN (SELECT unnest($images::INTEGER[])) AND decile = 10 GROUP BY latent ORDER BY n DESC, latent LIMIT $n
    )
    SELECT features.*, found.n AS n_found FROM features JOIN found USING (latent) WHERE sae = $sae ORDER BY found.n DESC, latent
"""
_OF_LATENTS = "SELECT * FROM features WHERE sae = $sae AND latent IN (SELECT unnest($latents::INTEGER[]))"
_OF_NUMBER = """
    SELECT features.*, cosine FROM neighbours JOIN features ON features.sae = neighbours.sae AND features.latent = other
    WHERE neighbours.sae = $sae AND neighbours.latent = $latent ORDER BY rank LIMIT $n
"""
_IMAGES = """
    SELECT image, left(image_id, 12) AS hash, width, height, label FROM images WHERE image IN (SELECT unnest($images::INTEGER[]))
"""

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
    keys = {"sae": sae, "text": text, "n": N_HITS}
    people = view.rows(_OF_LATENTS, sae=sae, latents=view.reviewed(sae).named_like(text)[:N_HITS])
    groups = [
        ("Names by people", f"The name that a person gave contains “{text}”.", people),
        ("Names", f"The name contains “{text}”.", [row for row in view.rows(_BY_NAME, **keys) if not view.named(sae, row["latent"])]),
        ("Other labellers' names", "A name by a labeller whose score is not the best contains it.", view.rows(_BY_LABELLER, **keys)),
        ("Classes", "The class on whose images it fires most contains it.", view.rows(_BY_CLASS, **keys)),
    ]
    captioned = [row["image"] for row in view.rows(_CAPTIONED, text=text)]
    if captioned:
        found = view.rows(_OF_IMAGES, sae=sae, images=captioned, n=N_HITS)
        groups.append(("Captions", f"Captions of images that fire it most contain it ({len(captioned)} images).", found))
    if text.isdecimal() and int(text) < view.opened.saes[sae]["n_latents"]:
        number = {"sae": sae, "latent": int(text)}
        groups.insert(0, ("Number", f"Latent {int(text)}.", view.rows(_OF_LATENTS, sae=sae, latents=[int(text)])))
        groups.insert(1, ("Neighbours", f"The directions most like that of latent {int(text)}.", view.rows(_OF_NUMBER, **number, n=N_HITS)))
    return [{"title": title, "text": meaning, "rows": rows, "images": []} for title, meaning, rows in groups if rows]


def _among(n_images: int) -> str:
    return f"By meaning, among {n_images:,} evaluation images."


def find_meaning(view: View, sae: str, q: str, wait: float = 0) -> Model:
    """Search by meaning: the text against each feature's mean image embedding in the model's joint space."""
    model = view.explorer.model
    return about_model(lambda: _name_hits(view, sae, model.search_text(sae, q, N_HITS, wait)))


def _name_hits(view: View, sae: str, hits: Any) -> list[dict[str, Any]]:
    """The features of hits, best first, each with its score as `hit`."""
    rows = {row["latent"]: row for row in view.rows(_OF_LATENTS, sae=sae, latents=list(hits.found))}
    return [rows[latent] | {"hit": score} for latent, score in zip(hits.found, hits.scores, strict=True) if latent in rows]


@router.get("/search", include_in_schema=False)
def search_page(request: Request, explorer: TheExplorer, query: Annotated[SearchQuery, Parameters()]) -> Response:
    """Show what a search finds, and say which kind of match each hit is."""
    with explorer.open(request) as view:
        sae, q = view.choose_sae(query.sae), query.q.strip()
        groups = find_words(view, sae, q)
        meaning = find_meaning(view, sae, q) if q and not explorer.settings.is_static else None
        rows = [row for group in groups for row in group["rows"]] + ((meaning.answer or []) if meaning else [])
        classes = view.rows(_CLASSES, text=q.lower(), n=N_HITS) if q else []
        tiles = previews(view, sae, sorted({row["latent"] for row in rows}), scales(rows), N_TILES)
        return view.render("search.html", sae, q=q, groups=groups, classes=classes, meaning=meaning, tiles=tiles, similar=None)


@router.post("/search", include_in_schema=False, dependencies=[Depends(check_form)])
def search_by_image(request: Request, explorer: TheExplorer, upload: Upload, sae: str | None = None) -> Response:
    """Show the features and images that are most like an uploaded image, which is not kept."""
    with explorer.open(request) as view:
        sae, encoded = view.choose_sae(sae), read_upload(upload)

        def ask() -> list[dict[str, Any]]:
            hits = explorer.model.search_image(sae, encoded, N_HITS, wait=30)
            images = {row["image"]: row for row in view.rows(_IMAGES, images=list(hits.images.found))}
            shown = zip(hits.images.found, hits.images.scores, strict=True)
            tiles = [make_tile(images[image], note=f"cosine {score:.2f}") for image, score in shown if image in images]
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
        tiles = previews(view, sae, sorted({row["latent"] for row in rows}), scales(rows), N_TILES)
        return view.render("search.html", sae, q="", groups=similar.answer or [], classes=[], meaning=None, tiles=tiles, similar=similar)


@router.get("/api/search", tags=["search"])
def search_json(request: Request, explorer: TheExplorer, query: Annotated[SearchQuery, Parameters()]) -> Response:
    """What a search finds, by kind of match; `meaning` waits up to a minute for the model."""
    with explorer.open(request) as view:
        sae = view.choose_sae(query.sae)
        meaning = find_meaning(view, sae, query.q, wait=60)
        return JSONResponse({"words": find_words(view, sae, query.q), "meaning": meaning.answer, "problem": meaning.problem})
