"""The start page: what the catalogue is about, its headline numbers beside their controls, and lists worth entering by."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi import Query as Parameters
from fastapi.responses import Response

from ommatid.explorer.cards import previews
from ommatid.explorer.drift import list_checks
from ommatid.explorer.features import IN_TABLE, FeatureQuery, find_features
from ommatid.explorer.web import Json, Query, TheExplorer, View
from ommatid.show.about import About, list_facts, make_headlines
from ommatid.show.drift import VERDICTS
from ommatid.show.svg import Axis, Plot, draw_grid

router = APIRouter()

LEAST_IMAGES = 16
"""Images on which a feature must fire to be in a list; the scores of rarer ones rest on too little."""
N_SHOWN = 4
"""Features shown of a list."""
N_TILES = 4
"""Images shown of a feature in a list."""
COLUMNS, ROWS = 24, 16
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
        {"sort": "over_control", "over_control": 0.2, "images_min": LEAST_IMAGES},
    ),
    (
        "Causal",
        "Of those that were tested: setting them moves the model's output more than every control does.",
        {"causal": "causal", "sort": "over_best"},
    ),
    (
        "Names not to believe",
        "Their names score no better than another latent's; first come those whose images are most alike.",
        {"state": "doubtful", "sort": "over_floor", "images_min": LEAST_IMAGES},
    ),
    (
        "Of one class",
        "Nearly all of their strongest images are of a single class.",
        {"sort": "purity", "purity_min": 0.9, "images_min": LEAST_IMAGES},
    ),
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

_ENDS = """
    SELECT min(density) AS least, max(density) AS most, min(ms) AS low, max(ms) AS high
    FROM features WHERE sae = $sae AND density > 0 AND ms IS NOT NULL
"""
_SCATTER = """
    SELECT x.edge AS x, y.edge AS y, count(*) AS n
    FROM (SELECT density, ms FROM features WHERE sae = $sae AND density > 0 AND ms IS NOT NULL) AS found
    ASOF JOIN (SELECT unnest($xs::DOUBLE[]) AS edge) AS x ON found.density >= x.edge
    ASOF JOIN (SELECT unnest($ys::DOUBLE[]) AS edge) AS y ON found.ms >= y.edge
    GROUP BY ALL ORDER BY ALL
"""


@router.get("/", include_in_schema=False)
def start_page(request: Request, explorer: TheExplorer, query: Annotated[Query, Parameters()]) -> Response:
    """Show the start page."""
    with explorer.open(request) as view:
        sae = view.choose_sae(query.sae)
        headlines, facts, plot, lists = _summarise(view, sae)
        checks = [] if view.explorer.settings.is_static else list_checks(view)
        drift = {"row": checks[0], "verdict": VERDICTS[checks[0]["verdict"]]} if checks else None
        return view.render("start.html", sae, headlines=headlines, facts=facts, plot=plot, lists=lists, drift=drift)


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
    """Draw how many features lie in each cell of density and MS. Edges have few digits, so that an address holds them exactly."""
    (ends,) = view.rows(_ENDS, sae=about.sae)
    if ends["least"] is None:
        return None
    xs = _edges(math.log10(ends["least"]), math.log10(ends["most"]), COLUMNS, lambda edge: float(f"{10**edge:.3g}"))
    ys = _edges(ends["low"], ends["high"], ROWS, lambda edge: round(edge, 4))
    to_x, to_y = dict(pairwise(xs)), dict(pairwise(ys))
    cells = [(row["x"], to_x[row["x"]], row["y"], to_y[row["y"]], row["n"]) for row in view.rows(_SCATTER, sae=about.sae, xs=xs, ys=ys)]
    name = about.name if len(view.opened.saes) > 1 else None

    def address(left: float, right: float, bottom: float, top: float) -> str:
        return FeatureQuery(sae=name).url(density_min=left, density_max=right, ms_min=bottom, ms_max=top)

    x = Axis(xs[0], xs[-1], "density", is_log=True)
    y = Axis(min(ys[0], about.floor), max(ys[-1], about.floor), "MS")
    title = "Features by the share of tokens on which they fire (density) and by monosemanticity (MS)"
    return draw_grid(title, x, y, cells, address, [(about.floor, "floor")])


def _edges(low: float, high: float, n: int, write: Callable[[float], float]) -> list[float]:
    """Edges of about n cells that hold all values between `low` and `high`, each as `write` rounds it."""
    step = (high - low) / n or 0.01
    return sorted({write(low + i * step) for i in range(-1, n + 2)})


def _find_lists(view: View, sae: str) -> list[dict[str, Any]]:
    """The lists with their first features, without those that are empty, or whose order the catalogue does not know."""
    lists = [one for one in LISTS if view.opened.is_intervened or "causal" not in one[2]]
    if champion := _last_champion(view, sae):
        text = "No latent of the champion before has a similar direction."
        lists.append(("New since the last champion", text, {"unmatched": champion, "sort": "over_floor", "images_min": LEAST_IMAGES}))
    found, latents = [], []
    for title, text, values in lists:
        query = FeatureQuery(sae=sae, n=N_SHOWN, **values)
        page, _ = find_features(view, query, IN_TABLE)  # as the first page should not wait until all cards are loaded
        rows = [feature.model_dump() for feature in page.features]
        if rows and rows[0]["sort_key"] is not None:
            found.append({"title": title, "text": text, "url": FeatureQuery(**values).url(sae=sae), "total": page.total, "rows": rows})
            latents += [row["latent"] for row in rows]
    tiles = previews(view, sae, latents, N_TILES)
    return [entry | {"tiles": tiles} for entry in found]


def _last_champion(view: View, sae: str) -> str | None:
    """The champion before an SAE, if the catalogue has matches with it."""
    sql = """
        SELECT other_sae FROM matches JOIN runs ON runs.sae = other_sae
        WHERE matches.sae = $sae AND decision = 'champion' GROUP BY other_sae ORDER BY max(decided_at) DESC LIMIT 1
    """
    found = view.rows(sql, sae=sae)
    return found[0]["other_sae"] if found else None
