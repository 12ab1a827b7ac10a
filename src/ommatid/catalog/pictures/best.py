"""The contact sheet: the best features, a row each, with their strongest examples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ommatid.catalog import Catalog
from ommatid.catalog.pictures.choice import choose_sae
from ommatid.catalog.pictures.examples import GAP, N_ACROSS, SIDE, load_examples, overlaid
from ommatid.catalog.pictures.page import GREY, MARGIN, Page, fixed, percent, short

MIN_IMAGES = 16
"""A feature that fires on fewer images is not among the best: its score rests on too little."""


def draw_best(catalog: Catalog, path: Path, n: int = 10, sae: str | None = None) -> None:
    """Draw a contact sheet of the `n` named features with the highest monosemanticity: a row each, with its strongest examples.

    Raises:
        QueryError: there is no such SAE; None is the best of the catalogue.
    """
    sae = choose_sae(catalog, sae)
    best = catalog.ask(BEST, {"sae": sae, "n": n, "least": MIN_IMAGES}).dicts()
    row, left = SIDE + 26, 300
    page = Page(2 * MARGIN + left + N_ACROSS * (SIDE + GAP), max(MARGIN + 46 + len(best) * row + 10, 160))
    page.text(MARGIN, MARGIN - 10, "Most monosemantic features", 15, weight="bold")
    page.text(page.width - MARGIN, MARGIN - 4, sae, 9, GREY, ha="right")
    page.text(MARGIN, MARGIN + 16, _caption(best), 9, GREY)
    for index, feature in enumerate(best):
        y = MARGIN + 50 + index * row
        _draw_name(page, y, left, feature)
        for i, example in enumerate(load_examples(catalog, feature, n_top=N_ACROSS)[:N_ACROSS]):
            page.tile(MARGIN + left + i * (SIDE + GAP), y, overlaid(example, feature["max_act"]))
    page.save(path)


def _caption(best: Sequence[dict[str, Any]]) -> str:
    if not best:
        return f"No latent has a label and fires on {MIN_IMAGES} images or more."
    floor, judge = best[0]["ms_floor"], best[0]["judge"]
    return (
        f"with a label, firing on {MIN_IMAGES} images or more; each row: its strongest evaluation images under the latent's heat map. "
        f"Judge {judge}, floor {fixed(floor)}"
    )


def _draw_name(page: Page, y: int, width: int, feature: dict[str, Any]) -> None:
    page.text(MARGIN, y + 4, short(feature["label"], 28), 12.5, weight="bold")
    page.text(MARGIN, y + 30, f"MS {fixed(feature['ms'])}    label score {fixed(feature['label_score'])}", 10)
    page.text(
        MARGIN, y + 52, f"latent {feature['latent']} · density {percent(feature['density'])} · {feature['n_images']:,} images", 8.5, GREY
    )


BEST = """
    SELECT * FROM features
    WHERE sae = $sae AND label IS NOT NULL AND NOT is_dead AND ms IS NOT NULL AND n_images >= $least
    ORDER BY ms DESC, latent LIMIT $n
"""
