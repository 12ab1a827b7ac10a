"""The page of an image: which features fire on it and where; and the pictures themselves."""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi import Path as Address
from fastapi import Query as Parameters
from fastapi.responses import JSONResponse, Response

from ommatid.errors import ArtefactError
from ommatid.explorer.heat import fit
from ommatid.explorer.web import FOREVER, NotFound, Query, TheExplorer, View, image_url

router = APIRouter()

_IMAGE = "SELECT * EXCLUDE (thumbnail), left(image_id, 12) AS hash FROM images WHERE image = $image"
_FIRING = """
    SELECT f.latent, f.act, label, label_score, control_score, ms, ms_floor, density, max_act, f.act / max_act AS strength
    FROM firings AS f JOIN features USING (sae, latent)
    WHERE f.sae = $sae AND image = $image ORDER BY strength DESC, f.latent LIMIT 200
"""
_THUMB = "SELECT thumbnail FROM images WHERE image = $image AND starts_with(image_id, $hash)"


class ImageQuery(Query):
    """Parameters of an image's page."""


def find_image(view: View, image: int) -> dict[str, Any]:
    """Return the row of an image.

    Raises:
        NotFound: There is no such image.
    """
    found = view.rows(_IMAGE, image=image) if 0 <= image < 2**31 else []
    if not found:
        (row,) = view.opened.kept("SELECT min(image) AS first, max(image) AS last FROM images")
        near = {f"image {row[end]}": image_url(row[end]) for end in ("first", "last")}
        raise NotFound(f"There is no image {image}; the data set has {row['first']} to {row['last']:,}.", near)
    return found[0]


@router.get("/images/{image}", include_in_schema=False)
def image_page(request: Request, explorer: TheExplorer, image: int, query: Annotated[ImageQuery, Parameters()]) -> Response:
    """Show an image and the features that fire on it."""
    with explorer.open(request) as view:
        sae = view.choose_sae(query.sae)
        row = find_image(view, image)
        firing = view.rows(_FIRING, sae=sae, image=image)
        return view.render("image.html", sae, image=row, size=fit(row["width"], row["height"], 448), firing=firing)


@router.get("/api/images/{image}", tags=["images"])
def image_json(request: Request, explorer: TheExplorer, image: int, query: Annotated[ImageQuery, Parameters()]) -> Response:
    """An image, and the features that fire on it, by strength."""
    with explorer.open(request) as view:
        found = find_image(view, image)
        return JSONResponse({"image": found, "features": view.rows(_FIRING, sae=view.choose_sae(query.sae), image=image)})


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
