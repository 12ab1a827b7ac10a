"""The start page: what the catalogue is about, its headline numbers beside their controls, and lists worth entering by."""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi import Query as Parameters
from fastapi.responses import Response

from ommatid.explorer.features import FeatureQuery, find_features, previews, scales
from ommatid.explorer.plots import Axis, Plot, draw_grid
from ommatid.explorer.web import Json, Query, TheExplorer, View
from ommatid.show.about import About, list_facts, make_headlines

router = APIRouter()

LEAST_IMAGES = 16
"""Images on which a feature must fire to be in a list; the scores of rarer ones rest on too little."""
N_SHOWN = 4
"""Features shown of a list."""
N_TILES = 4
"""Images shown of a feature in a list."""
COLUMNS, ROWS = 30, 20
"""Cells of the scatter of density and MS."""

LISTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "Most monosemantic",
        "Their images are most alike to a judge that never saw the SAE.",
        {"sort": "over_floor", "images_min": LEAST_IMAGES},
    ),
    (
        "Best named",
        "Their names find held-out images far better than another latent's name does.",
        {"sort": "over_control", "images_min": LEAST_IMAGES},
    ),
    (
        "Names not to believe",
        "The images are alike, but the name scores no better than another latent's.",
        {"state": "doubtful", "sort": "over_floor", "images_min": LEAST_IMAGES},
    ),
    ("Of one class", "Nearly all of their strongest images are of a single class.", {"sort": "purity", "images_min": LEAST_IMAGES}),
    (
        "Near duplicates",
        "Another latent has almost the same direction and fires on the same images.",
        {"state": "duplicate", "sort": "n_images"},
    ),
    (
        "Dense",
        "They fire on more than a tenth of all tokens, and often mean nothing that has a name.",
        {"state": "dense", "sort": "density"},
    ),
)
"""Title, meaning and query of each list."""

_SCATTER = f"""
    WITH found AS (
        SELECT log10(density) AS x, ms AS y FROM features WHERE sae = $sae AND density > 0 AND ms IS NOT NULL
    ), ends AS (SELECT min(x) AS x1, max(x) + 1e-9 AS x2, min(y) AS y1, max(y) + 1e-9 AS y2 FROM found)
    SELECT
        least(floor((x - x1) / (x2 - x1) * {COLUMNS}), {COLUMNS - 1})::INTEGER AS column,
        least(floor((y - y1) / (y2 - y1) * {ROWS}), {ROWS - 1})::INTEGER AS row,
        count(*) AS n, any_value(x1) AS x1, any_value(x2) AS x2, any_value(y1) AS y1, any_value(y2) AS y2
    FROM found, ends GROUP BY ALL ORDER BY ALL
"""


@router.get("/", include_in_schema=False)
def start_page(request: Request, explorer: TheExplorer, query: Annotated[Query, Parameters()]) -> Response:
    """Show the start page."""
    with explorer.open(request) as view:
        sae = view.choose_sae(query.sae)
        headlines, facts, plot, lists = _summarise(view, sae)
        return view.render("start.html", sae, headlines=headlines, facts=facts, plot=plot, lists=lists)


@router.get("/api/saes", tags=["runs"])
def saes_json(request: Request, explorer: TheExplorer) -> Response:
    """The SAEs of the catalogue, the one with the highest mean MS above its floor first."""
    with explorer.open(request) as view:
        return Json(
            [{name: str(value) if name.endswith("_at") else value for name, value in run.items()} for run in view.opened.saes.values()]
        )


def _summarise(view: View, sae: str) -> Any:
    """Everything on the page but what people said; kept while the catalogue is open, as it does not depend on the visitor."""
    key = ("start", sae)
    if key not in view.opened.cache:
        about = About(view.opened.catalog, sae)
        view.opened.cache[key] = make_headlines(about), list_facts(about), _draw_scatter(view, about), _find_lists(view, sae)
    return view.opened.cache[key]


def _draw_scatter(view: View, about: About) -> Plot | None:
    cells = view.rows(_SCATTER, sae=about.sae)
    if not cells:
        return None
    x1, x2, y1, y2 = (cells[0][name] for name in ("x1", "x2", "y1", "y2"))
    wide, high = (x2 - x1) / COLUMNS, (y2 - y1) / ROWS
    boxes = [
        (
            10 ** (x1 + row["column"] * wide),
            10 ** (x1 + (row["column"] + 1) * wide),
            y1 + row["row"] * high,
            y1 + (row["row"] + 1) * high,
            row["n"],
        )
        for row in cells
    ]
    title = "Features by the share of tokens on which they fire (density) and by monosemanticity (MS)"
    low, top = min(y1, about.floor), max(y2, about.floor)
    name = about.name if len(view.opened.saes) > 1 else None

    def address(left: float, right: float, bottom: float, top: float) -> str:
        return FeatureQuery(sae=name).url(
            density_min=f"{left:.6g}", density_max=f"{right:.6g}", ms_min=f"{bottom:.5g}", ms_max=f"{top:.5g}"
        )

    return draw_grid(title, Axis(10**x1, 10**x2, "density", is_log=True), Axis(low, top, "MS"), boxes, address, [(about.floor, "floor")])


def _find_lists(view: View, sae: str) -> list[dict[str, Any]]:
    """The lists with their first features, without those that are empty."""
    lists = [*LISTS]
    if champion := _last_champion(view, sae):
        text = "No latent of the champion before has a similar direction."
        lists.append(("New since the last champion", text, {"unmatched": champion, "sort": "over_floor", "images_min": LEAST_IMAGES}))
    found, latents, scale = [], [], {}
    for title, text, values in lists:
        query = FeatureQuery(sae=sae, n=N_SHOWN, **values)
        page, _, _ = find_features(view, query)
        if page.total:
            rows = [feature.model_dump() for feature in page.features]
            found.append({"title": title, "text": text, "url": FeatureQuery(**values).url(sae=sae), "total": page.total, "rows": rows})
            latents += [row["latent"] for row in rows]
            scale |= scales(rows)
    tiles = previews(view, sae, sorted(set(latents)), scale, N_TILES)
    return [entry | {"tiles": tiles} for entry in found]


def _last_champion(view: View, sae: str) -> str | None:
    """The champion before an SAE, if the catalogue has matches with it."""
    sql = """
        SELECT other_sae FROM matches JOIN runs ON runs.sae = other_sae
        WHERE matches.sae = $sae AND decision = 'champion' GROUP BY other_sae ORDER BY max(decided_at) DESC LIMIT 1
    """
    found = view.rows(sql, sae=sae)
    return found[0]["other_sae"] if found else None
