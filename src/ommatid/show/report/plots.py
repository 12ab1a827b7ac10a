"""The sections with a plot, and the plots as PNG: distributions over the latents of one SAE, with floor, chance and controls."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ommatid.catalog.reader import Catalog
from ommatid.show.pictures.best import MIN_IMAGES
from ommatid.show.pictures.comparison import HUES, make_plots
from ommatid.show.pictures.page import ACCENT, FAINT, GREY, INK, SIDE, Page, load_examples, overlaid, places, short
from ommatid.show.report.about import About
from ommatid.show.report.parts import Question, Section, fixed

FIDELITY = """
    SELECT r.name, r.variant, r.k, c.n_latents AS d_sae, c.dictionary, c.l0, c.fvu, c.ms - c.ms_floor AS above_floor
    FROM comparisons AS c JOIN runs AS r USING (sae) ORDER BY r.name, c.dictionary
"""
JUDGED = """
    SELECT dictionary, ms FROM judged WHERE sae = $sae AND judge = $judge AND ms IS NOT NULL
"""
DENSITIES = """
    SELECT density, ms, n_images FROM latents WHERE sae = $sae
"""
SCORES = """
    SELECT label_score, control_score FROM features WHERE sae = $sae AND label_score IS NOT NULL AND control_score IS NOT NULL
"""

WIDTH, HEIGHT = 620, 380
LEFT, TOP, RIGHT, BOTTOM = 62, 58, 18, 50
"""Around a plot, for a legend of two rows and the words on its axes."""
DENSITY = 2
"""Dots a pixel: sharp on a fine screen."""
N_BINS = 40
NAMES = {
    "sae": "this SAE",
    "untrained": "untrained SAE",
    "neurons": "raw neurons",
    "sparse_neurons": "sparse neurons",
    "pca": "PCA",
    "kmeans": "k-means",
    "nmf": "NMF",
}
COLOURS = {"sae": ACCENT, "untrained": "#c05621", "neurons": "#4a5159"}
"""Of dictionaries; others take what HUES has left."""


def draw_saes(catalog: Catalog) -> bytes:
    """All SAEs: FVU against L0, and MS above its floor against width."""
    return make_plots(catalog).png(DENSITY)


def draw_monosemanticity(scores: Mapping[str, Sequence[float]], floor: float) -> bytes:
    """Histogram of MS.

    Args:
        scores: MS of each latent that has one, by dictionary: `sae` and the controls.
        floor: What uniform weights score.
    """
    page, axes = _plot("MonoSemanticity score (MS) of a latent, mean cosine", "share of latents (%)")
    everything = np.concatenate([np.asarray(some) for some in scores.values()])
    low, high = min(floor, everything.min()), max(floor, everything.max())
    edges = np.linspace(low - 0.01, high + 0.01, N_BINS + 1)
    for i, (name, some) in enumerate(scores.items()):
        _histogram(axes, some, edges, NAMES.get(name, name), _colour(name, i), filled=name == "sae")
    axes.axvline(floor, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="floor")
    axes.set_xlim(edges[0], edges[-1])
    return _finished(page, axes)


def draw_densities(density: Sequence[float]) -> bytes:
    """Histogram of how often latents fire, and their mean."""
    page, axes = _plot("density: share of tokens on which a latent fires (%)", "latents")
    alive = 100 * np.asarray([share for share in density if share > 0])
    edges = np.geomspace(alive.min() / 1.1, alive.max() * 1.1, N_BINS + 1)
    axes.hist(alive, bins=edges, color=ACCENT, alpha=0.85)
    axes.axvline(
        100 * float(np.mean(density)), color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="mean over all latents, dead ones included"
    )
    _percent_scale(axes, edges[0], edges[-1])
    axes.yaxis.get_major_locator().set_params(integer=True)
    return _finished(page, axes)


def draw_scatter(rows: Sequence[tuple[float, float | None, int]], floor: float, least: int) -> bytes:
    """MS against density, a dot a latent.

    Args:
        rows: Density, MS and images of each latent.
        floor: Of MS.
        least: A latent that fires on fewer images is drawn pale.
    """
    page, axes = _plot("density: share of tokens on which a latent fires (%)", "MS, mean cosine")
    known = [(100 * density, ms, n) for density, ms, n in rows if density > 0 and ms is not None]
    for is_sure, colour, label in ((False, "#b9c0c9", f"fires on fewer than {least} images"), (True, ACCENT, f"on {least} or more")):
        some = [(density, ms) for density, ms, n in known if (n >= least) is is_sure]
        if some:
            axes.plot(*zip(*some, strict=True), ".", color=colour, markersize=3.2, alpha=0.7, markeredgewidth=0, label=label)
    axes.axhline(floor, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="floor")
    densities = [density for density, _, _ in known]
    _percent_scale(axes, min(densities) / 1.3, max(densities) * 1.3)
    return _finished(page, axes)


def draw_scores(scores: Sequence[float], controls: Sequence[float]) -> bytes:
    """Histogram of label scores beside those of the control."""
    page, axes = _plot("balanced accuracy on held-out images (%)", "share of latents (%)")
    everything = [100 * score for score in (*scores, *controls)]
    edges = np.arange(5 * np.floor(min(everything) / 5), 100.1 + 2.5, 2.5)
    _histogram(axes, [100 * score for score in scores], edges, "the latent's own name", ACCENT, filled=True)
    _histogram(axes, [100 * score for score in controls], edges, "another latent's name (control)", "#c05621", filled=False)
    axes.axvline(50, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="chance")
    axes.set_xlim(edges[0], 100)
    return _finished(page, axes)


def draw_examples(catalog: Catalog, feature: Mapping[str, Any]) -> bytes:
    """The strongest images of a feature, strongest first, under the latent's heat map, as WebP."""
    strongest, _ = load_examples(catalog, feature)
    at = places(max(1, len(strongest)))
    strip = np.full((at[-1][1] + SIDE, max(x for x, _ in at) + SIDE, 3), 255, np.uint8)
    for (x, y), example in zip(at, strongest, strict=False):
        strip[y : y + SIDE, x : x + SIDE] = overlaid(example, feature["max_act"])
    out = io.BytesIO()
    Image.fromarray(strip).save(out, "WEBP", quality=86)
    return out.getvalue()


def _plot(across: str, up: str) -> tuple[Page, Any]:
    page = Page(WIDTH, HEIGHT)
    axes = page.axes(LEFT, TOP, WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
    axes.tick_params(labelsize=9)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(across, fontsize=10, color=GREY)
    axes.set_ylabel(up, fontsize=10, color=GREY)
    return page, axes


def _finished(page: Page, axes: Any) -> bytes:
    """With the legend above the plot, where it covers nothing."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, frameon=False, fontsize=9, labelcolor=INK, handlelength=1.6, markerscale=3
    )
    return page.png(DENSITY)


def _histogram(axes: Any, values: Sequence[float], edges: np.ndarray, label: str, colour: str, filled: bool) -> None:
    weights = np.full(len(values), 100 / max(len(values), 1))
    style = {"histtype": "stepfilled", "alpha": 0.5, "edgecolor": colour} if filled else {"histtype": "step", "linewidth": 1.6}
    axes.hist(values, bins=edges, weights=weights, label=short(label, 40), color=colour, **style)


def _percent_scale(axes: Any, low: float, high: float) -> None:
    """Logarithmic, its marks written as plain numbers."""
    marks = [mark for power in range(-7, 3) for mark in (10.0**power, 3 * 10.0**power) if low <= mark <= high]
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(marks, labels=[f"{mark:.10g}" for mark in marks])
    axes.set_xticks([], minor=True)


def _colour(name: str, place: int) -> str:
    return COLOURS.get(name, HUES[(place + 2) % len(HUES)])


def make_fidelity(about: About) -> Section:
    """FVU against L0, and MS above its floor against width, of every SAE."""
    reading = (
        "Left: the lower, the more is reconstructed; the further left, the fewer latents a token needs. An SAE is better than another "
        "where it lies below it at the same L0. Right: the higher, the more a latent means one thing, on average. At or below the dashed "
        "line of the untrained SAEs, training did nothing for meaning."
    )
    picture = draw_saes(about.catalog)
    return Section("Reconstruction and monosemanticity", reading, Question(FIDELITY), picture, is_wide=True)


def make_monosemanticity(about: About) -> Section:
    """Histogram of MS, with floor and controls."""
    title, question = "Monosemanticity of the latents", about.question(JUDGED, judge=about.run["judge"])
    found: dict[str, list[float]] = {"sae": []}
    for name, ms in question.ask(about.catalog).rows:
        found.setdefault(name, []).append(ms)
    if not found["sae"]:
        return Section(title, "Nothing to show: MS is undefined for every latent.", question)
    reading = (
        f"How alike, to the judge {about.run['judge']}, the images are that fire a latent: 1 is one picture over and over, the floor, "
        f"{fixed(about.floor)}, is what unrelated images score. Latents to the right of the controls are clearer than without training."
    )
    return Section(title, reading, question, draw_monosemanticity(found, about.floor))


def make_densities(about: About) -> Section:
    """Histogram of how often latents fire."""
    title, question = "How often latents fire", about.question(DENSITIES)
    densities = [density for density, _, _ in question.ask(about.catalog).rows]
    if not any(densities):
        return Section(title, "Nothing to show: no latent fires.", question)
    reading = (
        "Latents far to the right fire on much of everything and rarely mean one thing; latents far to the left rest on few tokens. "
        f"{densities.count(0):,} dead latents, of density 0, have no place on a logarithmic scale."
    )
    return Section(title, reading, question, draw_densities(densities))


def make_scatter(about: About) -> Section:
    """MS against density."""
    title, question = "Monosemanticity against density", about.question(DENSITIES)
    rows = question.ask(about.catalog).rows
    if not any(ms is not None for _, ms, _ in rows):
        return Section(title, "Nothing to show: MS is undefined for every latent.", question)
    reading = (
        f"A dot a latent. High scores of pale dots rest on fewer than {MIN_IMAGES} images and may be luck: believe what stays high further "
        "to the right. A cloud that only rises to the left says that rarity alone makes latents look monosemantic."
    )
    return Section(title, reading, question, draw_scatter(rows, about.floor, MIN_IMAGES))


def make_scores(about: About) -> Section:
    """Histogram of label scores and of their controls."""
    title, question = "Do names hold on held-out images?", about.question(SCORES)
    rows = question.ask(about.catalog).rows
    if not rows:
        return Section(title, "Nothing to show: no latent has a name that could be scored.", question)
    reading = (
        "How well a name picks the images that fire its latent out of mixed ones that did not make the name; 50 % is chance. Names are "
        "worth what the filled histogram lies to the right of the outlined one, which is the same test with another latent's name."
    )
    own, control = zip(*rows, strict=True)
    return Section(title, reading, question, draw_scores(own, control))
