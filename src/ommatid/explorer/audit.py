"""The page of the audit: features on which the model leans for a class for the wrong reason, with pictures."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi import Query as Parameters
from fastapi.responses import Response
from pydantic import Field

from ommatid.catalog.question import Question
from ommatid.explorer.cards import load_images
from ommatid.explorer.heat import Tile, make_tile
from ommatid.explorer.web import Json, NotFound, Query, TheExplorer, View, link
from ommatid.show.audit import (
    AUDITS,
    CLASSES,
    HEADINGS,
    NO_PROOF,
    STATUSES,
    SUSPICIOUS,
    draw_worst,
    say_counts,
    say_reasons,
    say_test,
)

router = APIRouter()

N_SHOWN = 12
"""Tested pairs that are shown with pictures."""
N_LISTED = 100
"""Other pairs that are listed."""
BOX = 96
"""Longest side of the pictures, in pixels."""

_IMAGES = "SELECT latent, class, part, rank, image, called FROM audit_images WHERE sae = $sae ORDER BY latent, class, part, rank"


class AuditQuery(Query):
    """Which SAE, and which class."""

    name: Annotated[str | None, Field(max_length=20_000)] = None
    """Name of the class; left out: all."""


def find_suspicious(view: View, sae: str) -> Sequence[Mapping[str, Any]]:
    """Return the pairs of a class and a latent that are suspicious, the most alarming first; none if the catalogue has no audit."""
    return view.opened.kept(SUSPICIOUS, sae=sae) if "audit" in view.opened.relations else []


def describe_audit(view: View, query: AuditQuery) -> dict[str, Any]:
    """Collect what the catalogue says of the audit of an SAE, as its page and the JSON API show it.

    Raises:
        NotFound: No evaluation image is of the class.
    """
    sae = view.choose_sae(query.sae)
    is_audited = "audits" in view.opened.relations
    counts = next(iter(view.opened.kept(AUDITS, sae=sae)), None) if is_audited else None
    pairs = find_suspicious(view, sae)
    if query.name is not None and query.name not in {row["label"] for row in view.opened.kept(CLASSES)}:
        near = {row["class"]: link("/audit", name=row["class"], sae=query.sae) for row in pairs[:5]}
        raise NotFound(f"No evaluation image is of a class {query.name[:200]!r}.", near)
    mine = [row for row in pairs if query.name in (None, row["class"])]
    return {"sae": sae, "counts": counts, "classes": sorted({row["class"] for row in pairs}), "pairs": mine}


@router.get("/audit", include_in_schema=False)
def audit_page(request: Request, explorer: TheExplorer, query: Annotated[AuditQuery, Parameters()]) -> Response:
    """Show the audit."""
    with explorer.open(request) as view:
        found = describe_audit(view, query)
        tested = [row for row in found["pairs"] if row["n_tested"] is not None][:N_SHOWN]
        keys = {(row["latent"], row["class"]) for row in tested}
        return view.render(
            "audit.html",
            found["sae"],
            sae_page="/audit",
            query=query,
            counts=found["counts"],
            said=say_counts(found["counts"]) if found["counts"] else [],
            no_proof=NO_PROOF,
            classes=found["classes"],
            tested=[(row, say_reasons(row), say_test(row), draw_worst(row)) for row in tested],
            others=[row for row in found["pairs"] if (row["latent"], row["class"]) not in keys][:N_LISTED],
            n_pairs=len(found["pairs"]),
            tiles=_make_tiles(view, found["sae"]) if tested else {},
            statuses=STATUSES,
            headings=HEADINGS,
            sql=Question(SUSPICIOUS, {"sae": found["sae"]}).text,
        )


@router.get("/api/audit", tags=["classes"])
def audit_json(request: Request, explorer: TheExplorer, query: Annotated[AuditQuery, Parameters()]) -> Response:
    """Features on which the model leans for a class for the wrong reason: what was counted, and all suspicious pairs."""
    with explorer.open(request) as view:
        return Json(describe_audit(view, query))


def _make_tiles(view: View, sae: str) -> dict[tuple[int, str, str], list[Tile]]:
    """Return the pictures of each tested pair, by latent, class and part; below each is what the model calls it."""
    rows = view.opened.kept(_IMAGES, sae=sae)
    images = load_images(view, {row["image"] for row in rows})
    found: dict[tuple[int, str, str], list[Tile]] = {}
    for row in rows:
        if image := images.get(row["image"]):
            note = f"called {row['called']}" if row["part"] != "others_with" else f"{image['label']}, called {row['called']}"
            found.setdefault((row["latent"], row["class"], row["part"]), []).append(make_tile(image, box=BOX, note=note[:60]))
    return found
