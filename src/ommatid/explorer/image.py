"""The pages of an image, of the data set or a visitor's own: which features fire on it, and where; and the pictures themselves."""

import base64
import json
from typing import Annotated, Any

from fastapi import APIRouter, Depends, File, Form, Request, UploadFile
from fastapi import Path as Address
from fastapi import Query as Parameters
from fastapi.responses import Response

from ommatid.catalog.question import Question
from ommatid.errors import ArtefactError
from ommatid.explorer.cards import load_features, previews
from ommatid.explorer.heat import draw_svg, encode, fit
from ommatid.explorer.model import Model, about_model
from ommatid.explorer.model_client import EncodedImage
from ommatid.explorer.security import check_form
from ommatid.explorer.steer_box import make_steer_box
from ommatid.explorer.web import FOREVER, BadRequest, Json, NotFound, Query, TheExplorer, View, image_url

router = APIRouter()

BOX = 512
"""Longest side of the picture on its page, in pixels."""
SMALL = 132
"""Longest side of the picture with a feature's heat map."""
N_FIRING = 24
"""Features shown with their heat maps."""
N_PATCH = 8
"""Latents listed of a patch."""

Upload = Annotated[UploadFile, File()]
SaeField = Annotated[str | None, Form()]

_IMAGE = "SELECT * EXCLUDE (thumbnail), left(image_id, 12) AS hash FROM images WHERE image = $image"
_STRONGEST = "SELECT latent, act FROM image_latents WHERE sae = $sae AND image = $image ORDER BY rank"
_FIRING = """
    SELECT f.latent, f.act, label, label_score, control_score, ms, ms_floor, density, max_act
    FROM (SELECT sae, latent, act FROM firings WHERE sae = $sae AND image = $image) AS f JOIN features USING (sae, latent)
    ORDER BY f.act DESC, f.latent
"""
_SHOWN = """
    SELECT latent, act, label FROM firings JOIN features USING (sae, latent)
    WHERE sae = $sae AND image = $image ORDER BY act / max_act DESC
"""
"""The question that the page shows; `_STRONGEST` answers it faster."""
_THUMB = "SELECT thumbnail FROM images WHERE image = $image AND starts_with(image_id, $hash)"
_FEATURES = "SELECT * FROM features WHERE sae = $sae AND latent IN (SELECT unnest($latents::INTEGER[]))"
_NUMBERS = "SELECT min(image) AS first, max(image) AS last FROM images"


class ImageQuery(Query):
    """Parameters of an image's page."""

    where: bool = False
    """Whether to show where the features fire, for which the model looks at the image again."""


def find_image(view: View, image: int) -> dict[str, Any]:
    """Return the row of an image.

    Raises:
        NotFound: There is no such image.
    """
    found = view.rows(_IMAGE, image=image) if 0 <= image < 2**31 else []
    if not found:
        (row,) = view.opened.kept(_NUMBERS)
        near = {f"image {row[end]}": image_url(row[end]) for end in ("first", "last")}
        raise NotFound(f"There is no image {image}; the data set has {row['first']} to {row['last']:,}.", near)
    return found[0]


def find_strongest(view: View, sae: str, image: int) -> list[dict[str, Any]]:
    """Return the features that fire most strongly on an image, by their activation as a share of their largest."""
    found = view.rows(_STRONGEST, sae=sae, image=image)
    features = load_features(view, sae, [row["latent"] for row in found])
    rows = [features[row["latent"]] | row | {"strength": row["act"] / features[row["latent"]]["max_act"]} for row in found]
    return sorted(rows, key=lambda row: (-row["strength"], row["latent"]))


def read_upload(upload: UploadFile) -> bytes:
    """Return the bytes of an uploaded file.

    Raises:
        BadRequest: No file was chosen.
    """
    encoded = upload.file.read()
    if not encoded:
        raise BadRequest("upload: no image was chosen, or it is empty; choose an image file.")
    return encoded


def show_where(view: View, sae: str, found: EncodedImage) -> dict[str, Any]:
    """What a page needs to show where latents fire on an image.

    Returns:
        The picture as a data URL and its size in the page; the features that fire, with their heat maps; and the strongest latents of
        each patch as JSON: latents and activations by patch, row by row, and the names of the latents.
    """
    shown = list(found.latents[:N_FIRING])
    in_patches = {latent for patch in found.patches for latent in patch.latents[:N_PATCH]}
    rows = {row["latent"]: row for row in view.rows(_FEATURES, sae=sae, latents=sorted({*shown, *in_patches}))}
    firing = []
    for latent, act, heat in zip(found.latents, found.acts, found.heat or [[]] * len(shown), strict=False):
        if latent in rows and len(firing) < N_FIRING:
            written = encode(heat, max(heat)) if len(heat) and max(heat) > 0 else None
            svg = draw_svg(written, found.rows, found.cols, (found.seen_width, found.seen_height)) if written else None
            firing.append({"row": rows[latent], "act": act, "heat": written, "svg": svg})
    patches = [[[latent, round(act, 2)] for latent, act in zip(p.latents[:N_PATCH], p.acts, strict=False)] for p in found.patches]
    people = view.reviewed(sae).names
    names = {
        latent: (people.get(latent) or rows[latent]["label"] or "without a name")[:80] for latent in sorted(in_patches) if latent in rows
    }
    return {
        "picture": f"data:image/webp;base64,{base64.b64encode(found.picture).decode()}",
        "size": fit(found.picture_width, found.picture_height, BOX),
        "small": fit(found.picture_width, found.picture_height, SMALL),
        "is_sharp": max(found.picture_width, found.picture_height) < BOX,
        "firing": firing,
        "n_firing": found.n_firing,
        "grid": f"{found.rows} {found.cols}",
        "seen": f"{found.seen_width:.4g} {found.seen_height:.4g}",
        "patches": json.dumps({"patches": patches, "names": names}, separators=(",", ":")) if found.rows else None,
    }


@router.get("/images/{image}", include_in_schema=False)
def image_page(request: Request, explorer: TheExplorer, image: int, query: Annotated[ImageQuery, Parameters()]) -> Response:
    """Show an image of the data set, the features that fire on it, and where."""
    with explorer.open(request) as view:
        sae = view.choose_sae(query.sae)
        row = find_image(view, image)
        firing = find_strongest(view, sae, image)
        where = None
        if query.where:
            where = about_model(lambda: show_where(view, sae, explorer.model.encode(sae, explorer.originals.get(image, row["hash"])[0])))
        tiles = previews(view, sae, (one["latent"] for one in firing), n=3)
        size = fit(row["width"], row["height"], BOX)
        sql = Question(_SHOWN, {"sae": sae, "image": image}).text
        return view.render("image.html", sae, image=row, size=size, firing=firing, tiles=tiles, where=where, box=BOX, sql=sql)


@router.get("/api/images/{image}", tags=["images"])
def image_json(request: Request, explorer: TheExplorer, image: int, query: Annotated[Query, Parameters()]) -> Response:
    """An image, and the features that fire on it, by strength."""
    with explorer.open(request) as view:
        found = find_image(view, image)
        return Json({"image": found, "features": view.rows(_FIRING, sae=view.choose_sae(query.sae), image=image)})


@router.get("/my-image", include_in_schema=False)
def my_image_form(request: Request, explorer: TheExplorer, query: Annotated[Query, Parameters()]) -> Response:
    """Show the form for an image that is not in the data set."""
    with explorer.open(request) as view:
        return view.render("my_image.html", view.choose_sae(query.sae), where=None, name=None, steer_box=None)


@router.post("/my-image", include_in_schema=False, dependencies=[Depends(check_form)])
def my_image_page(request: Request, explorer: TheExplorer, upload: Upload, sae: SaeField = None) -> Response:
    """Show which features fire on an uploaded image, which stays in memory."""
    with explorer.open(request) as view:
        sae, encoded = view.choose_sae(sae or None), read_upload(upload)
        where = about_model(lambda: show_where(view, sae, explorer.model.encode(sae, encoded, wait=60)))
        shown = [entry["row"]["latent"] for entry in where.answer["firing"]] if where.answer else []
        steer_box = make_steer_box(view, sae, None, features=load_features(view, sae, shown))
        return view.render("my_image.html", sae, where=where, name=upload.filename, steer_box=steer_box)


@router.post("/api/my-image", tags=["images"], dependencies=[Depends(check_form)])
def my_image_json(request: Request, explorer: TheExplorer, upload: Upload, sae: SaeField = None) -> Response:
    """The features that fire on an uploaded image, and their heat maps, row by row."""
    with explorer.open(request) as view:
        sae, encoded = view.choose_sae(sae or None), read_upload(upload)
    found: Model = about_model(lambda: explorer.model.encode(sae, encoded, wait=60))
    if found.answer is None:
        return Json({"error": found.problem or str(found.starting)}, 503)
    one: EncodedImage = found.answer
    kept = ("width", "height", "seen_width", "seen_height", "rows", "cols", "n_firing", "latents", "acts", "heat")
    return Json({name: getattr(one, name) for name in kept})


@router.get("/thumbs/{image}/{hash}.webp", include_in_schema=False)
def thumb(request: Request, explorer: TheExplorer, image: int, hash: str) -> Response:
    """Answer a thumbnail, whose address holds the image's checksum."""
    with explorer.open(request) as view:
        found = view.rows(_THUMB, image=image, hash=hash) if len(hash) >= 12 and 0 <= image < 2**31 else []
        if not found:
            raise NotFound(f"There is no image {image} with the checksum {hash[:64]}.")
        return Response(found[0]["thumbnail"], media_type="image/webp", headers={"cache-control": FOREVER})


@router.get("/originals/{image}/{hash}", include_in_schema=False)
def original(explorer: TheExplorer, image: int, hash: Annotated[str, Address(pattern="^[0-9a-f]{12,64}$")]) -> Response:
    """Answer an image in full size, whose address holds its checksum."""
    try:
        content, type_ = explorer.originals.get(image, hash)
    except ArtefactError as error:
        raise NotFound(str(error)) from None
    return Response(content, media_type=type_, headers={"cache-control": FOREVER})
