"""The page of drift: checks of new images against the champion's, and the latents that have changed, with pictures of both."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi import Query as Parameters
from fastapi.responses import Response
from pydantic import Field

from ommatid.catalog.question import Question
from ommatid.explorer.web import FOREVER, Json, NotFound, Query, TheExplorer, View, link
from ommatid.show.drift import TESTS, VERDICTS, describe_change

router = APIRouter()

N_LISTED = 100
"""Changed latents that are listed without pictures."""

_CHECKS = "SELECT * FROM drift_checks ORDER BY check_id DESC"
_LATENTS = "SELECT * FROM drift WHERE check_id = $check_id AND is_changed ORDER BY rank"
_IMAGES = "SELECT latent, side, rank, path, act FROM drift_images WHERE check_id = $check_id ORDER BY latent, side, rank"
_PICTURE = "SELECT thumbnail FROM drift_images WHERE check_id = $check_id AND latent = $latent AND side = $side AND rank = $rank"


class DriftQuery(Query):
    """Which check."""

    check: Annotated[str | None, Field(max_length=100)] = None
    """Name of the check; left out: the newest."""


def list_checks(view: View) -> Sequence[Mapping[str, Any]]:
    """Return all checks, the newest first; none if the catalogue has none."""
    return view.opened.kept(_CHECKS) if "drift_checks" in view.opened.relations else []


def check_url(check_id: str) -> str:
    """Address of a check."""
    return link("/drift", check=check_id)


def find_check(view: View, check_id: str | None) -> Mapping[str, Any] | None:
    """Find a check by its name, or the newest; None if there is none at all.

    Raises:
        NotFound: There is no check of this name.
    """
    checks = list_checks(view)
    if check_id is None:
        return next(iter(checks), None)
    if found := next((one for one in checks if one["check_id"] == check_id), None):
        return found
    near = {f"check {one['check_id']}": check_url(one["check_id"]) for one in checks[:3]}
    raise NotFound(f"There is no check {check_id!r} of drift in this catalogue.", near or {"drift": "/drift"})


@router.get("/drift", include_in_schema=False)
def drift_page(request: Request, explorer: TheExplorer, query: Annotated[DriftQuery, Parameters()]) -> Response:
    """Show the checks, and one of them with its latents."""
    with explorer.open(request) as view:
        sae, check = view.choose_sae(query.sae), find_check(view, query.check)
        latents = view.rows(_LATENTS, check_id=check["check_id"]) if check else []
        pictures = _find_pictures(view, check["check_id"]) if check else {}
        shown = [(row, *(pictures.get((row["latent"], side), []) for side in ("before", "new"))) for row in latents]
        return view.render(
            "drift.html",
            sae,
            checks=list_checks(view),
            check=check,
            numbers=list(_iter_numbers(check)) if check else [],
            verdicts=VERDICTS,
            shown=[entry for entry in shown if entry[1] or entry[2]],
            others=[row for row, before, new in shown if not (before or new)][:N_LISTED],
            n_changed=len(latents),
            describe=describe_change,
            is_here=bool(check) and check["sae"] in view.opened.saes,  # type: ignore[index]
            check_url=check_url,
            sql=Question(_LATENTS, {"check_id": check["check_id"]}).text if check else "",
        )


@router.get("/api/drift", tags=["runs"])
def drift_json(request: Request, explorer: TheExplorer, query: Annotated[DriftQuery, Parameters()]) -> Response:
    """Checks of new images against the champion's, and the changed latents of the check `check`, or of the newest."""
    with explorer.open(request) as view:
        check = find_check(view, query.check)
        latents = view.rows(_LATENTS, check_id=check["check_id"]) if check else []
        return Json({"checks": list_checks(view), "check": check, "latents": latents})


@router.get("/drift/pictures/{check_id}/{latent}/{side}/{rank}.webp", include_in_schema=False)
def drift_picture(request: Request, explorer: TheExplorer, check_id: str, latent: int, side: str, rank: int) -> Response:
    """Send a thumbnail."""
    with explorer.open(request) as view:
        is_possible = "drift_images" in view.opened.relations and 0 <= latent < 2**31 and 0 <= rank < 2**31
        found = view.rows(_PICTURE, check_id=check_id, latent=latent, side=side, rank=rank) if is_possible else []
        if not found:
            raise NotFound("There is no such picture of a check of drift.", {"drift": "/drift"})
        return Response(found[0]["thumbnail"], media_type="image/webp", headers={"cache-control": FOREVER})


def _find_pictures(view: View, check_id: str) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """Return the pictures of each latent and side, the strongest first."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in view.rows(_IMAGES, check_id=check_id):
        url = f"/drift/pictures/{quote(check_id, safe='')}/{row['latent']}/{row['side']}/{row['rank']}.webp"
        found.setdefault((row["latent"], row["side"]), []).append(row | {"url": url})
    return found


def _iter_numbers(check: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, bool]]:
    """Yield title, value, what is expected by chance, p value, and whether it is below alpha, of each kind of test that was made."""
    for test in TESTS:
        if check[test.p] is not None:
            p = check[test.p]
            yield test.title, test.value(check), test.chance(check), f"{p:.3f}" if p >= 0.001 else "below 0.001", p <= check["alpha"]
