"""The sections with a plot, most of them distributions over the latents of one SAE, with floor, chance and controls."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ommatid.catalog.question import Question
from ommatid.catalog.reader import Catalog
from ommatid.show.about import About
from ommatid.show.numbers import fixed, in_order, interval
from ommatid.show.pictures.best import MIN_IMAGES
from ommatid.show.pictures.comparison import HUES, make_plots
from ommatid.show.pictures.comparison import WIDTH as COMPARISON_WIDTH
from ommatid.show.pictures.page import ACCENT, FAINT, GREY, INK, SIDE, Page, load_examples, overlaid, places, short
from ommatid.show.report.parts import Section, Table

FIDELITY = """
    SELECT r.name, r.variant, r.k, c.n_latents AS d_sae, c.dictionary, c.l0, c.fvu, c.ms - c.ms_floor AS above_floor
    FROM comparisons AS c JOIN runs AS r USING (sae) ORDER BY r.name, c.dictionary
"""
LAYERS = """
    SELECT
        r.name, r.hookpoint || coalesce(' to ' || r.target, '') AS place, c.l0, c.fvu, c.ms - c.ms_floor AS above_floor,
        c.ms_low - c.ms_floor AS low, c.ms_high - c.ms_floor AS high, n.ms - n.ms_floor AS neurons, r.label_score, r.control_score,
        r.downstream_kl, r.sae
    FROM comparisons AS c JOIN runs AS r USING (sae)
    LEFT JOIN comparisons AS n ON n.sae = c.sae AND n.dictionary = 'neurons'
    WHERE c.dictionary = 'sae' ORDER BY place, above_floor DESC NULLS LAST, r.sae
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

LAYERS_HEAD = "SAE, hookpoint, L0, FVU, MS − floor, 95 % interval, raw neurons, label score, its control, KL"
WIDTH, HEIGHT = 620, 380
LEFT, TOP, RIGHT, BOTTOM = 62, 58, 18, 50
"""Margins of a plot for a legend of two rows and the labels of the axes, in pixels."""
DENSITY = 2
"""Dots per pixel, so that plots are sharp on high-resolution screens."""
N_BINS = 40
"""Bins of a histogram."""
NAMES = {
    "sae": "this SAE",
    "untrained": "untrained SAE",
    "neurons": "raw neurons",
    "sparse_neurons": "sparse neurons",
    "pca": "PCA",
    "kmeans": "k-means",
    "nmf": "NMF",
}
"""What the report calls each dictionary."""
COLOURS = {"sae": ACCENT, "untrained": "#c05621", "neurons": "#4a5159"}
"""Colours of dictionaries; others take the remaining colours of `HUES`."""


def draw_saes(catalog: Catalog) -> bytes:
    """Draw FVU against L0, and MS above its floor against width, for all SAEs."""
    return make_plots(catalog).png(DENSITY)


def draw_layers(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw MS above its floor, FVU and label score by hookpoint, each beside its control.

    Args:
        rows: `place`, in order, and the numbers of each SAE: `above_floor` with its interval `low` to `high`, `neurons`, `fvu`,
            `label_score` and `control_score`.

    Returns:
        A PNG file.
    """
    page = Page(COMPARISON_WIDTH, HEIGHT)
    spots = dict(zip(dict.fromkeys(row["place"] for row in rows), range(len(rows)), strict=False))
    width = COMPARISON_WIDTH // 3
    panels = (
        ("mean MS − floor, with 95 % interval", "above_floor", "neurons", "raw neurons"),
        ("fraction of variance unexplained", "fvu", None, None),
        ("mean label score", "label_score", "control_score", "another latent's label"),
    )
    for i, (up, key, control, name) in enumerate(panels):
        axes = page.axes(i * width + LEFT, TOP, width - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
        axes.grid(axis="y", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_ylabel(up, fontsize=10, color=GREY)
        axes.set_xlim(-0.5, len(spots) - 0.5)
        axes.set_xticks([*spots.values()], labels=[short(spot, 24) for spot in spots], fontsize=9, rotation=0 if len(spots) < 4 else 20)
        for row in rows:
            same = [other["sae"] for other in rows if other["place"] == row["place"]]
            x = spots[row["place"]] + 0.5 * (same.index(row["sae"]) - (len(same) - 1) / 2) / len(same)
            if key == "above_floor" and row["low"] is not None:
                axes.plot([x, x], [row["low"], row["high"]], color=ACCENT, linewidth=1.6, alpha=0.7)
            if row[key] is not None:
                axes.plot(x, row[key], "o", color=ACCENT, markersize=6)
            if control and row[control] is not None:
                axes.plot(x, row[control], "_", color=COLOURS["untrained"], markersize=12, markeredgewidth=1.8)
        page.text(i * width + LEFT, 20, "●", 11, ACCENT)
        page.text(i * width + LEFT + 16, 22, "an SAE", 9)
        if name:
            page.text(i * width + LEFT + 76, 20, "—", 11, COLOURS["untrained"])
            page.text(i * width + LEFT + 96, 22, name, 9)
    return page.png(DENSITY)


def draw_monosemanticity(scores: Mapping[str, Sequence[float]], floor: float) -> bytes:
    """Draw histograms of MS, one per dictionary.

    Args:
        scores: MS of each latent for which it is defined, by dictionary: `sae` and the controls.
        floor: MS of uniform weights.

    Returns:
        A PNG file.
    """
    page, axes = _plot("MonoSemanticity score (MS) of a latent, mean cosine", "share of latents (%)")
    all_scores = np.concatenate([np.asarray(values) for values in scores.values()])
    low, high = min(floor, all_scores.min()), max(floor, all_scores.max())
    edges = np.linspace(low - 0.01, high + 0.01, N_BINS + 1)
    for i, (name, values) in enumerate(scores.items()):
        _histogram(axes, values, edges, NAMES.get(name, name), _colour(name, i), filled=name == "sae")
    axes.axvline(floor, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="floor")
    axes.set_xlim(edges[0], edges[-1])
    return _save(page, axes)


def draw_densities(density: Sequence[float]) -> bytes:
    """Draw a histogram of the density of latents, with the mean, as PNG."""
    page, axes = _plot("density: share of tokens on which a latent fires (%)", "latents")
    alive = 100 * np.asarray([share for share in density if share > 0])
    edges = np.geomspace(alive.min() / 1.1, alive.max() * 1.1, N_BINS + 1)
    axes.hist(alive, bins=edges, color=ACCENT, alpha=0.85)
    axes.axvline(100 * float(np.mean(density)), color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="mean, including dead latents")
    _percent_scale(axes, edges[0], edges[-1])
    axes.yaxis.get_major_locator().set_params(integer=True)
    return _save(page, axes)


def draw_scatter(rows: Sequence[tuple[float, float | None, int]], floor: float, least: int) -> bytes:
    """Draw MS against density, with one dot per latent.

    Args:
        rows: Density, MS and number of images of each latent.
        floor: Floor of MS.
        least: Number of images below which a latent's dot is pale.

    Returns:
        A PNG file.
    """
    page, axes = _plot("density: share of tokens on which a latent fires (%)", "MS, mean cosine")
    known = [(100 * density, ms, n) for density, ms, n in rows if density > 0 and ms is not None]
    for is_sure, colour, label in ((False, "#b9c0c9", f"fires on fewer than {least} images"), (True, ACCENT, f"on {least} or more")):
        points = [(density, ms) for density, ms, n in known if (n >= least) is is_sure]
        if points:
            axes.plot(*zip(*points, strict=True), ".", color=colour, markersize=3.2, alpha=0.7, markeredgewidth=0, label=label)
    axes.axhline(floor, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="floor")
    densities = [density for density, _, _ in known]
    _percent_scale(axes, min(densities) / 1.3, max(densities) * 1.3)
    return _save(page, axes)


def draw_effects(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw the effect of latents above that of their best control against MS, with intervals.

    Args:
        rows: `ms`, `above`, its interval `low` to `high`, and whether the latent is `causal`.

    Returns:
        A PNG file.
    """
    page, axes = _plot("MS, mean cosine", "effect less best control, cosine")
    for is_causal, colour, label in ((False, "#8a929c", "not causal"), (True, ACCENT, "causal")):
        some = [row for row in rows if (row["causal"] == "causal") is is_causal]
        if some:
            ms, above, low, high = (np.array([row[key] for row in some]) for key in ("ms", "above", "low", "high"))
            axes.errorbar(ms, above, (above - low, high - above), fmt=".", color=colour, markersize=4, elinewidth=0.8, label=label)
    axes.axhline(0, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="best control")
    axes.yaxis.labelpad = 0
    return _save(page, axes)


def draw_scores(scores: Sequence[float], controls: Sequence[float]) -> bytes:
    """Draw histograms of label scores and of the scores of their controls, as PNG."""
    page, axes = _plot("balanced accuracy on held-out images (%)", "share of latents (%)")
    percentages = [100 * score for score in (*scores, *controls)]
    edges = np.arange(5 * np.floor(min(percentages) / 5), 100.1 + 2.5, 2.5)
    _histogram(axes, [100 * score for score in scores], edges, "the latent's own label", ACCENT, filled=True)
    _histogram(axes, [100 * score for score in controls], edges, "another latent's label (control)", "#c05621", filled=False)
    axes.axvline(50, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label="chance")
    axes.set_xlim(edges[0], 100)
    return _save(page, axes)


def draw_examples(catalog: Catalog, feature: Mapping[str, Any]) -> bytes:
    """Draw the strongest images of a feature with the latent's heat map, strongest first, as WebP."""
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


def _save(page: Page, axes: Any) -> bytes:
    """Add the legend above the plot, where it covers nothing, and return the page as PNG."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, frameon=False, fontsize=9, labelcolor=INK, handlelength=1.6, markerscale=3
    )
    return page.png(DENSITY)


def _histogram(axes: Any, values: Sequence[float], edges: np.ndarray, label: str, colour: str, filled: bool) -> None:
    weights = np.full(len(values), 100 / max(len(values), 1))
    style = {"histtype": "stepfilled", "alpha": 0.5, "edgecolor": colour} if filled else {"histtype": "step", "linewidth": 1.6}
    axes.hist(values, bins=edges, weights=weights, label=short(label, 40), color=colour, **style)


def _percent_scale(axes: Any, low: float, high: float) -> None:
    """Scale the axis logarithmically, with marks written as plain numbers."""
    marks = [mark for power in range(-7, 3) for mark in (10.0**power, 3 * 10.0**power) if low <= mark <= high]
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(marks, labels=[f"{mark:.10g}" for mark in marks])
    axes.set_xticks([], minor=True)


def _colour(name: str, place: int) -> str:
    return COLOURS.get(name, HUES[(place + 2) % len(HUES)])


def make_fidelity(about: About) -> Section:
    """Make the section about reconstruction and monosemanticity of all SAEs."""
    reading = (
        "Left: a lower point means better reconstruction, and a point further to the left means fewer latents per token. At equal L0, the "
        "SAE with the lower FVU is better. Right: the higher a point, the more clearly its latents mean one thing, on average. For an SAE "
        "at or below the dashed line of the untrained SAEs, training did not make latents more monosemantic."
    )
    picture = draw_saes(about.catalog)
    return Section("Reconstruction and monosemanticity", reading, Question(FIDELITY), picture, is_wide=True)


def make_layers(about: About) -> list[Section]:
    """Make the section that sets hookpoints side by side, if the SAEs have several."""
    question = Question(LAYERS)
    rows = sorted(question.ask(about.catalog).dicts(), key=lambda row: in_order(row["place"]))  # stable: the best of a hookpoint first
    if len({row["place"] for row in rows}) < 2:
        return []
    reading = (
        "The SAEs by the hookpoint that they encode, each beside the control of its own hookpoint. MS and label scores are comparable, as "
        "the images and the judge are the same. FVU is a share of the variance of each hookpoint's own activations; what a reconstruction "
        "costs the model is comparable again: the divergence of its answers (KL, in nats) with x̂ in the place of x. Directions of "
        "different hookpoints are not compared, as they lie in different spaces."
    )
    cells = [
        (
            row["name"],
            row["place"],
            f"{row['l0']:.1f}",
            fixed(row["fvu"]),
            fixed(row["above_floor"]),
            interval(row["low"], row["high"]),
            fixed(row["neurons"]),
            fixed(row["label_score"]),
            fixed(row["control_score"]),
            fixed(row["downstream_kl"]),
        )
        for row in rows
    ]
    strong = next((i for i, row in enumerate(rows) if row["sae"] == about.sae), None)
    return [
        Section(
            "Layers side by side", reading, question, draw_layers(rows), True, Table(tuple(LAYERS_HEAD.split(", ")), tuple(cells), strong)
        )
    ]


def make_monosemanticity(about: About) -> Section:
    """Make the section about the MS of the latents, compared with the floor and the controls."""
    title, question = "Monosemanticity of the latents", about.question(JUDGED, judge=about.run["judge"])
    found: dict[str, list[float]] = {"sae": []}
    for name, ms in question.ask(about.catalog).rows:
        found.setdefault(name, []).append(ms)
    if not found["sae"]:
        return Section(title, "Nothing to show: MS is undefined for every latent.", question)
    reading = (
        f"How similar the judge {about.run['judge']} finds the images that fire a latent: 1 means the same picture over and over, and "
        f"unrelated images score the floor, {fixed(about.floor)}. Latents to the right of the controls are more monosemantic than without "
        "training."
    )
    return Section(title, reading, question, draw_monosemanticity(found, about.floor))


def make_densities(about: About) -> Section:
    """Make the section about how often latents fire."""
    title, question = "How often latents fire", about.question(DENSITIES)
    densities = [density for density, _, _ in question.ask(about.catalog).rows]
    if not any(densities):
        return Section(title, "Nothing to show: no latent fires.", question)
    reading = (
        "Latents far to the right fire on many different images and rarely mean one thing; latents far to the left fire on few tokens. "
        f"Dead latents ({densities.count(0):,}) are not shown, because a density of 0 has no place on a logarithmic scale."
    )
    return Section(title, reading, question, draw_densities(densities))


def make_scatter(about: About) -> Section:
    """Make the section about MS against density."""
    title, question = "Monosemanticity against density", about.question(DENSITIES)
    rows = question.ask(about.catalog).rows
    if not any(ms is not None for _, ms, _ in rows):
        return Section(title, "Nothing to show: MS is undefined for every latent.", question)
    reading = (
        f"Each dot is a latent. High scores of pale dots rest on fewer than {MIN_IMAGES} images and may be chance; high scores further to "
        "the right are more reliable. If the cloud rises only to the left, rarity alone makes latents look monosemantic."
    )
    return Section(title, reading, question, draw_scatter(rows, about.floor, MIN_IMAGES))


def make_scores(about: About) -> Section:
    """Make the section about the scores of labels and of their controls."""
    title, question = "Do the labels hold up on held-out images?", about.question(SCORES)
    rows = question.ask(about.catalog).rows
    if not rows:
        return Section(title, "Nothing to show: no latent has a label that could be scored.", question)
    reading = (
        "How well a label distinguishes images that fire its latent from images that do not; none of these images was used to make the "
        "label, and 50 % is chance. Labels are informative if the filled histogram lies to the right of the outlined one, which is the "
        "same test with another latent's label."
    )
    own, control = zip(*rows, strict=True)
    return Section(title, reading, question, draw_scores(own, control))
