"""The contact sheet: the best features, one per row, with their strongest images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ommatid.catalog.question import choose_sae
from ommatid.catalog.reader import Catalog
from ommatid.show.pictures.page import (
    GAP,
    GREY,
    MARGIN,
    N_ACROSS,
    N_STRONGEST,
    SIDE,
    Page,
    fixed,
    load_examples,
    overlaid,
    percent,
    places,
    short,
)

MIN_IMAGES = 16
"""Number of images a feature must fire on to be shown; the score of others rests on too little."""
ROW = N_STRONGEST // N_ACROSS * (SIDE + GAP) + 20
"""Height of a feature, in pixels."""


def draw_best(catalog: Catalog, path: Path, n: int = 10, sae: str | None = None) -> None:
    """Draw a contact sheet of the labelled features with the highest monosemanticity, each with its strongest images.

    Args:
        catalog: The open catalogue.
        path: PNG file to write.
        n: Number of features.
        sae: Name of the SAE; None for the one with the highest mean MS above its floor.

    Raises:
        QueryError: There is no such SAE, or the file cannot be written.
    """
    sae = choose_sae(catalog, sae)
    best = catalog.ask(BEST, {"sae": sae, "n": n, "least": MIN_IMAGES}).dicts()
    left = 300
    page = Page(2 * MARGIN + left + N_ACROSS * (SIDE + GAP), max(MARGIN + 46 + len(best) * ROW + 10, 160))
    page.text(MARGIN, MARGIN - 10, "Most monosemantic features", 15, weight="bold")
    page.text(page.width - MARGIN, MARGIN - 4, sae, 9, GREY, ha="right")
    page.text(MARGIN, MARGIN + 16, _caption(best), 9, GREY)
    for index, feature in enumerate(best):
        y = MARGIN + 50 + index * ROW
        _draw_label(page, y, feature)
        strongest, _ = load_examples(catalog, feature)
        for (right, down), example in zip(places(len(strongest)), strongest, strict=True):
            page.tile(MARGIN + left + right, y + down, overlaid(example, feature["max_act"]))
    page.save(path)


def _caption(best: Sequence[dict[str, Any]]) -> str:
    if not best:
        return f"No latent has a label and fires on at least {MIN_IMAGES} images."
    floor, judge = best[0]["ms_floor"], best[0]["judge"]
    return (
        f"labelled features that fire on at least {MIN_IMAGES} images, with heat maps on their {N_STRONGEST} strongest evaluation images. "
        f"Judge {judge}, floor {fixed(floor)}"
    )


def _draw_label(page: Page, y: int, feature: dict[str, Any]) -> None:
    page.text(MARGIN, y + 4, short(feature["label"], 28), 12.5, weight="bold")
    page.text(MARGIN, y + 30, f"MS {fixed(feature['ms'])}    label score {fixed(feature['label_score'])}", 10)
    if feature["purity"] is not None:
        page.text(MARGIN, y + 70, f"purity {fixed(feature['purity'])}: share of the commonest class", 8.5, GREY)
    page.text(
        MARGIN, y + 52, f"latent {feature['latent']} · density {percent(feature['density'])} · {feature['n_images']:,} images", 8.5, GREY
    )


BEST = """
    SELECT * FROM features
    WHERE sae = $sae AND label IS NOT NULL AND NOT is_dead AND ms IS NOT NULL AND n_images >= $least
    ORDER BY ms DESC, latent LIMIT $n
"""
