"""The picture of one feature: label, numbers, examples by decile with heat maps, histogram, classes and neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps

from ommatid.catalog.question import choose_sae
from ommatid.catalog.reader import Catalog
from ommatid.errors import QueryError
from ommatid.show.doses import STATUSES_IN_WORDS
from ommatid.show.pictures.page import (
    ACCENT,
    ALARM,
    GAP,
    GREY,
    HEAT,
    INK,
    MARGIN,
    N_ACROSS,
    SIDE,
    Example,
    Page,
    fixed,
    has_heat,
    load_examples,
    overlaid,
    percent,
    short,
    square,
)

GUTTER = 68
"""Space to the left of the examples for the name of the decile, in pixels."""
SIDEBAR = 330
"""Width of the sidebar, in pixels."""
TOP = MARGIN + 74
"""Top of the examples, below the header, in pixels."""
N_DECILES = 5
"""Largest number of deciles drawn below the strongest images, evenly spread, so that everything fits on one page."""


@dataclass(frozen=True)
class Sidebar:
    """What is drawn beside the examples."""

    acts: list[float]
    """Image-level activation on each image that fires the latent."""
    classes: list[tuple[Any, ...]]
    """The commonest classes of those images: name, number of images, share."""
    neighbours: list[tuple[Any, ...]]
    """The nearest latents: index, cosine, label."""

    @property
    def height(self) -> int:
        """Height that a page needs for the sidebar, in pixels."""
        return TOP + (224 if self.acts else 0) + (84 + 20 * len(self.classes)) + (24 + 20 * len(self.neighbours)) + MARGIN


def draw_feature(catalog: Catalog, latent: int, path: Path, sae: str | None = None) -> None:
    """Draw one feature: label, numbers, examples from strong to weak with heat maps, histogram, classes and neighbours.

    Args:
        catalog: The open catalogue.
        latent: Index of the latent.
        path: PNG file to write.
        sae: Name of the SAE; None for the one with the highest mean MS above its floor.

    Raises:
        QueryError: There is no such latent or SAE, or the file cannot be written.
    """
    feature = _feature(catalog, choose_sae(catalog, sae), latent)
    top, others = load_examples(catalog, feature)
    lower = [[e for e in others if e.decile == decile] for decile in _deciles(others)]
    width = 2 * MARGIN + GUTTER + N_ACROSS * (SIDE + GAP) + 40 + SIDEBAR
    sidebar = _sidebar(catalog, feature)
    page = Page(width, max(_height(top, lower), sidebar.height))
    _draw_header(page, feature)
    _draw_examples(page, top, lower, feature["max_act"])
    _draw_sidebar(page, sidebar, feature, has_heat(top))
    page.save(path)


def _feature(catalog: Catalog, sae: str, latent: int) -> dict[str, Any]:
    found = catalog.ask("SELECT * FROM features WHERE sae = $sae AND latent = $latent", {"sae": sae, "latent": latent}).dicts()
    if found:
        return found[0]
    ((lowest, highest),) = catalog.rows("SELECT min(latent), max(latent) FROM features WHERE sae = $sae", {"sae": sae})
    raise QueryError(f"no latent {latent}; {sae} has {lowest} to {highest}")


def _deciles(examples: Sequence[Example]) -> list[int]:
    """Return at most `N_DECILES` of the examples' deciles, evenly spread, strongest first."""
    found = sorted({e.decile for e in examples}, reverse=True)
    if len(found) <= N_DECILES:
        return found
    return [found[round(i * (len(found) - 1) / (N_DECILES - 1))] for i in range(N_DECILES)]


def _height(top: Sequence[Example], lower: Sequence[Sequence[Example]]) -> int:
    return TOP + -(-len(top) // N_ACROSS) * _pair_height(top) + len(lower) * (SIDE + 24) + MARGIN // 2


def _pair_height(examples: Sequence[Example]) -> int:
    """Return the height of a row of pictures with its heat maps, if there are any, and its activations, in pixels."""
    return (2 * SIDE + 2 if has_heat(examples) else SIDE) + 24


def _draw_header(page: Page, feature: dict[str, Any]) -> None:
    label = feature["label"] or f"no label: {(feature['label_status'] or 'no labeller was run').replace('_', ' ')}"
    page.text(MARGIN, MARGIN - 10, short(label, 60), 20, INK if feature["label"] else GREY, weight="bold")
    page.text(page.width - MARGIN, MARGIN - 12, f"latent {feature['latent']}", 14, GREY, ha="right")
    page.text(page.width - MARGIN, MARGIN + 8, feature["sae"], 8, GREY, ha="right")
    page.text(MARGIN, MARGIN + 30, "     ".join(_numbers(feature)), 10.5, GREY)
    if feature["is_dead"]:
        page.text(page.width - MARGIN, MARGIN + 33, "dead: fires on no evaluation image", 10.5, ALARM, ha="right", weight="bold")
    page.rule(MARGIN + 58)


def _numbers(feature: dict[str, Any]) -> list[str]:
    score = f"label score {fixed(feature['label_score'])}"
    if feature["control_score"] is not None:
        score += f" (another latent's label {fixed(feature['control_score'])})"
    causal = feature.get("causal")  # a catalogue of an earlier version has no such column
    return [
        score,
        f"MS {fixed(feature['ms'])} (floor {fixed(feature['ms_floor'])}, judge {feature['judge']})",
        f"density {percent(feature['density'])}",
        f"purity {fixed(feature['purity'])}",
        f"fires on {feature['n_images']:,} images",
        *([] if causal in (None, "untested") else [STATUSES_IN_WORDS[causal]]),
    ]


def _draw_examples(page: Page, top: Sequence[Example], lower: Sequence[Sequence[Example]], max_act: float) -> None:
    y = TOP
    if not top:
        page.text(MARGIN, y + 10, "No examples: the latent fires on no image.", 11, GREY)
    for start in range(0, len(top), N_ACROSS):
        page.text(MARGIN, y + 2, "strongest" if start == 0 else "", 8.5, GREY)
        _draw_pairs(page, y, top[start : start + N_ACROSS], max_act)
        y += _pair_height(top)
    for examples in lower:
        page.text(MARGIN, y + 2, f"decile {examples[0].decile}", 8.5, GREY)
        _draw_side_by_side(page, y, examples, max_act)
        y += SIDE + 24


def _draw_pairs(page: Page, y: int, examples: Sequence[Example], max_act: float) -> None:
    """Draw pictures, and below each its heat map and activation."""
    for i, example in enumerate(examples):
        x = MARGIN + GUTTER + i * (SIDE + GAP)
        page.tile(x, y, square(example.picture, SIDE))
        if has_heat(examples):
            page.tile(x, y + SIDE + 2, overlaid(example, max_act))
        page.text(x, y + _pair_height(examples) - 21, f"{example.act:.2f}", 8, GREY)


def _draw_side_by_side(page: Page, y: int, examples: Sequence[Example], max_act: float) -> None:
    """Draw as many pictures as fit, each with its heat map beside it."""
    step = 2 if has_heat(examples) else 1
    for i, example in enumerate(examples[: N_ACROSS // step]):
        x = MARGIN + GUTTER + i * step * (SIDE + GAP)
        page.tile(x, y, square(example.picture, SIDE))
        if step == 2:
            page.tile(x + SIDE + 2, y, overlaid(example, max_act))
        page.text(x, y + SIDE + 3, f"{example.act:.2f}", 8, GREY)


def _sidebar(catalog: Catalog, feature: dict[str, Any]) -> Sidebar:
    values = {"sae": feature["sae"], "latent": feature["latent"]}
    acts = [act for (act,) in catalog.rows(_ACTS, values)]
    return Sidebar(acts, catalog.rows(_CLASSES, values), catalog.rows(_NEIGHBOURS, values))


def _draw_sidebar(page: Page, sidebar: Sidebar, feature: dict[str, Any], has_heat: bool) -> None:
    x, y = page.width - MARGIN - SIDEBAR, TOP
    if sidebar.acts:
        _draw_histogram(page, x, y, sidebar.acts)
        y += 184
    if has_heat:
        _draw_scale(page, x, y, feature["max_act"])
        y += 40
    if sidebar.classes:
        _draw_classes(page, x, y, sidebar.classes, feature["top_classes"])
        y += 84 + 20 * len(sidebar.classes)
    if sidebar.neighbours:
        _draw_neighbours(page, x, y, sidebar.neighbours)


def _draw_scale(page: Page, x: int, y: int, max_act: float) -> None:
    """Draw the colour scale of the heat maps."""
    page.text(x, y, "heat", 8.5, GREY)
    page.text(x + 56, y, "0", 8.5, GREY, ha="right")
    ramp = colormaps[HEAT](np.linspace(0, 1, 200))[:, :3] * 255
    page.tile(x + 64, y + 1, np.broadcast_to(ramp.astype(np.uint8), (11, 200, 3)))
    page.text(x + 272, y, f"{max_act:.2f}", 8.5, GREY)


def _draw_histogram(page: Page, x: int, y: int, acts: Sequence[float]) -> None:
    page.text(x, y, "Activations on images that fire the latent", 10, weight="bold")
    axes = page.axes(x + 30, y + 24, SIDEBAR - 30, 120)
    axes.hist(acts, bins=30, range=(0, max(acts)), color=ACCENT)
    axes.set_ylabel("images", fontsize=7.5, color=GREY)
    axes.set_xlim(0, max(acts))
    axes.yaxis.get_major_locator().set_params(integer=True, nbins=4)


def _draw_classes(page: Page, x: int, y: int, classes: Sequence[tuple[Any, ...]], strongest: Sequence[str] | None) -> None:
    """Draw the commonest classes as bars."""
    page.text(x, y, "Classes of those images", 10, weight="bold")
    for i, (name, n, share) in enumerate(classes):
        at = y + 24 + 20 * i
        page.text(x + 104, at, short(name, 16), 8.5, ha="right")
        axes = page.axes(x + 112, at + 1, 140, 11)
        axes.set_axis_off()
        axes.set_xlim(0, 1)
        axes.barh([0, 0], [1, share], color=["#eef0f2", ACCENT])
        page.text(x + SIDEBAR, at, f"{n:,} · {share:.0%}", 8.5, GREY, ha="right")
    if strongest:
        page.text(x, y + 30 + 20 * len(classes), short(f"of the 16 strongest: {', '.join(strongest)}", 54), 8.5, GREY)


def _draw_neighbours(page: Page, x: int, y: int, neighbours: Sequence[tuple[Any, ...]]) -> None:
    page.text(x, y, "Nearest directions", 10, weight="bold")
    page.text(x + SIDEBAR, y + 1, "cosine", 8.5, GREY, ha="right")
    for i, (other, cosine, label) in enumerate(neighbours):
        at = y + 24 + 20 * i
        page.text(x + 44, at, f"{other}", 8.5, GREY, ha="right")
        page.text(x + 56, at, short(label or "no label", 34), 8.5, INK if label else GREY)
        page.text(x + SIDEBAR, at, fixed(cosine), 8.5, GREY, ha="right")


_ACTS = "SELECT act FROM firings WHERE sae = $sae AND latent = $latent"
_CLASSES = """
    SELECT label, count(*)::INTEGER AS n, count(*) / sum(count(*)) OVER () AS share
    FROM firings JOIN images USING (image)
    WHERE sae = $sae AND latent = $latent AND label IS NOT NULL
    GROUP BY label ORDER BY n DESC, label LIMIT 6
"""
_NEIGHBOURS = """
    SELECT other, cosine, features.label
    FROM neighbours JOIN features ON features.sae = neighbours.sae AND features.latent = other
    WHERE neighbours.sae = $sae AND neighbours.latent = $latent ORDER BY rank
"""
