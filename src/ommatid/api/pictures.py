"""Pictures of interventions on single images: dose curves beside their controls, and the latents that an output comes from."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ommatid.compute.controls import RANDOM_ARMS
from ommatid.intervene.steering import Steered
from ommatid.show.numbers import percent
from ommatid.show.pictures.page import ACCENT, ALARM, FAINT, GREY, INK, MARGIN, Example, Page, overlaid, short, square

MOST_IMAGES = 8
"""Largest number of images that are drawn; the rest is counted."""
MOST_HEAT = 2
"""Largest number of latents whose heat is drawn on each image of a steered one."""
TILE, GAP = 200, 12
"""Width and height of a picture, and the pixels between two, in pixels."""
HEADER = 66
"""Height of a page's header, in pixels."""
CURVE = 380
"""Width of a dose curve, in pixels."""
ROW = 290
"""Height of the drawing of one steered image, in pixels."""
LEAST_SPAN = (2.0, 0.02)
"""Least span of the vertical axis of a dose curve, in percentage points or of a score, so that tiny changes look tiny."""
WORDS = 300
"""Width of the names beside a dose curve, in pixels."""
CONTROLS = {
    "sign_flipped": ("sign flipped", "#b7791f", "--"),
    "diff_means": ("difference of means", "#6b46c1", "-."),
    "random_latent": ("random latents", "#4a5568", "-"),
    "random_direction": ("random directions", "#a0aec0", "-"),
}
"""Name, colour and line of each control in a plot."""


@dataclass(frozen=True, eq=False)
class Photograph:
    """An image on a page."""

    name: str
    """Its name."""
    picture: Image.Image
    """The upright image."""
    box: tuple[float, float, float, float]
    """Part of it that the model sees: (left, top, right, bottom) in pixels."""

    def heated(self, heat: np.ndarray, most: float, side: int) -> np.ndarray:
        """Draw a heat map (rows, cols) over the part that the model sees; see `overlaid`."""
        left, top, right, bottom = self.box
        seen = (right - left) / self.picture.width, (bottom - top) / self.picture.height
        return overlaid(Example(0, most, heat.astype(np.float32), self.picture, seen), most, side)


def draw_steered(steered: Steered, photographs: Sequence[Photograph], follow: str | None = None) -> Page:
    """Draw each image, where the edited latents fire on it, and the dose curve of one name beside every control.

    Args:
        steered: The results.
        photographs: The images, in their order.
        follow: Name whose dose curve is drawn; None chooses one for each image, as `Steered.follow` describes.

    Returns:
        The page. It shows at most `MOST_IMAGES` images.
    """
    shown = photographs[:MOST_IMAGES]
    n_heat = min(MOST_HEAT, len(steered.latents)) if steered.grid else 0
    left = MARGIN + (1 + n_heat) * (TILE + GAP) + 62
    notes = [line for warning in steered.warnings for line in textwrap.wrap(short(f"! {warning}", 660), 165)]
    if len(photographs) > len(shown):
        notes.append(f"{len(photographs) - len(shown)} more images are in the table.")
    width = left + CURVE + 36 + WORDS + MARGIN
    page = Page(width, MARGIN + HEADER + len(shown) * ROW + 16 * len(notes) + MARGIN)
    _draw_title(page, steered)
    for place, photograph in enumerate(shown):
        y = MARGIN + HEADER + place * ROW
        _draw_tiles(page, y, steered, place, photograph, n_heat)
        name, why = (follow, "the first text") if follow is not None else steered.follow(place)
        _draw_curve(page, left, y, steered, place, name, why)
        _draw_words(page, left + CURVE + 36, y, steered, place)
    for i, line in enumerate(notes):
        page.text(MARGIN, MARGIN + HEADER + len(shown) * ROW + 16 * i, line, 8.5, ALARM)
    return page


def _draw_title(page: Page, steered: Steered) -> None:
    named = [f"{latent} {label or '(no label)'}" for latent, label in zip(steered.latents, steered.labels, strict=True)]
    page.text(MARGIN, MARGIN - 10, short(f"latent{'s' * (len(named) > 1)} {', '.join(named)}", 80), 16, weight="bold")
    page.text(MARGIN, MARGIN + 24, describe_doses(steered), 9.5, GREY)
    page.rule(MARGIN + 50)


def describe_doses(steered: Steered) -> str:
    """Describe the doses both ways, such as `set to 0, 4.29 and 8.58 (0, 0.5 and 1 times its 99th percentile)`."""
    verbs = {"set": "set to", "add": "raised by", "scale": "multiplied by"}
    if steered.kind == "scale":
        return f"multiplied by {_listed(steered.doses)}"
    if len(steered.latents) > 1:
        scales = ", ".join(f"{scale:.3g}" for scale in steered.scales_l.tolist())
        times = _listed(steered.relative_pl[:, 0].tolist()) if (steered.relative_pl == steered.relative_pl[:, :1]).all() else None
        return (
            f"{verbs[steered.kind]} {times} times their 99th percentiles ({scales})"
            if times
            else f"{verbs[steered.kind]} {_listed(steered.doses)}"
        )
    absolute, relative = (_listed(values[:, 0].tolist()) for values in (steered.acts_pl, steered.relative_pl))
    return f"{verbs[steered.kind]} {absolute}, which is {relative} times its 99th percentile, {float(steered.scales_l[0]):.3g}"


def _listed(values: Sequence[float]) -> str:
    words = [f"{value:.3g}" for value in values]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _draw_tiles(page: Page, y: int, steered: Steered, image: int, photograph: Photograph, n_heat: int) -> None:
    page.tile(MARGIN, y, square(photograph.picture, TILE))
    page.text(MARGIN, y + TILE + 6, short(photograph.name, 34), 8.5)
    for place in range(n_heat):
        x, heat = MARGIN + (place + 1) * (TILE + GAP), steered.heat(image)
        assert heat is not None
        most = max(float(heat[place].max()), float(steered.scales_l[place]) or 0.0)
        page.tile(x, y, photograph.heated(heat[place].numpy(), most, TILE))
        acts = steered.acts_bkl[image, :, place]
        n = int((acts > 0).sum())
        fires = f"fires on {n} of {len(acts)} tokens,\nat most {float(acts.max()):.3g}" if n else "is silent"
        page.text(x, y + TILE + 6, f"latent {steered.latents[place]} {fires}", 8.5, INK if n else ALARM)


def _draw_curve(page: Page, x: int, y: int, steered: Steered, image: int, name: str, why: str) -> None:
    """Draw a name's probability, or score if it is the only one, by dose, with the lines of all controls."""
    at, single = steered.names.index(name), len(steered.names) == 1
    values, doses = steered.scores_abn if single else 100 * steered.log_p_abn.exp(), steered.doses
    page.text(x, y - 4, short(f"{'score' if single else 'probability'} of “{' '.join(name.split())}”", 48), 9.5, weight="bold")
    page.text(x, y + 12, f"({why})", 7.5, GREY)
    axes = page.axes(x, y + 32, CURVE, 160)
    is_one = len(doses) == 1  # a line needs two, so that marks take its place
    for i, (arm, (label, colour, line)) in enumerate(CONTROLS.items()):
        drawn = [steered.of(values, arm, dose)[:, image, at] for dose in doses]
        if not len(drawn[0]):
            continue
        x_of = [0.2 * (i + 1)] if is_one else doses
        axes.plot(
            x_of,
            [float(of_dose.mean()) for of_dose in drawn],
            marker="_" if is_one else "",
            markersize=14,
            color=colour,
            linestyle=line,
            linewidth=1,
            label=label,
        )
        if arm in RANDOM_ARMS:  # shown as the range of its draws
            low, high = ([float(end(of_dose)) for of_dose in drawn] for end in (min, max))
            if is_one:
                axes.vlines(x_of, low, high, color=colour, alpha=0.5, linewidth=6)
            else:
                axes.fill_between(doses, low, high, color=colour, alpha=0.25, linewidth=0)
    axes.axhline(float(steered.of(values, "untouched")[0, image, at]), color=INK, linestyle=":", linewidth=1, label="x̂, no edit")
    plain = float(steered.of(values, "none")[0, image, at])
    axes.axhline(plain, color=FAINT, linewidth=2, zorder=0, label="the plain model")
    targeted = [float(steered.of(values, "targeted", dose)[0, image, at]) for dose in doses]
    axes.plot([0.0] if is_one else doses, targeted, color=ACCENT, linewidth=2.2, marker="o", markersize=4, label="the edit", zorder=5)
    low, high = axes.get_ylim()
    low, high = min(low, plain - 0.5 * LEAST_SPAN[single]), max(high, plain + 0.5 * LEAST_SPAN[single])
    axes.set_ylim(low if single else max(low, 0), high if single else min(high, 100))
    if is_one:
        axes.set_xticks([])
    axes.set_xlabel(f"dose {doses[0]:g}" if is_one else "dose", fontsize=7.5, color=GREY, labelpad=1)
    axes.set_ylabel("score" if single else "%", fontsize=7.5, color=GREY)
    axes.margins(x=0.02)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=4, fontsize=6.5, frameon=False, handlelength=2.2, columnspacing=1.2)


def _draw_words(page: Page, x: int, y: int, steered: Steered, image: int) -> None:
    """List the highest names at the strongest dose, with their places before."""
    dose = steered.doses[-1]
    before_n, after_n = steered.of(steered.ranks_abn, "none")[0, image], steered.of(steered.ranks_abn, "targeted", dose)[0, image]
    p_before_n, p_after_n = (
        of_arm[0, image].exp() for of_arm in (steered.of(steered.log_p_abn, "none"), steered.of(steered.log_p_abn, "targeted", dose))
    )
    page.text(x, y - 4, f"highest at dose {dose:g}, and before", 9.5, weight="bold")
    for i, place in enumerate(after_n.argsort()[:8].tolist()):
        at = y + 26 + 20 * i
        page.text(x + 14, at, f"{int(after_n[place])}", 8.5, GREY, ha="right")
        page.text(x + 24, at, short(" ".join(steered.names[place].split()), 22), 8.5)
        page.text(x + 222, at, percent(float(p_after_n[place])), 8.5, ACCENT, ha="right")
        page.text(x + WORDS, at, f"{int(before_n[place])}.  {percent(float(p_before_n[place]))}", 8.5, GREY, ha="right")


@dataclass(frozen=True, eq=False)
class Source:
    """A latent that an output comes from, on one image."""

    latent: int
    """Index of the latent."""
    label: str | None
    """Its label."""
    effect: float
    """Its effect."""
    exact: float | None
    """Its exact effect; None if it was not ablated."""
    map: np.ndarray | None
    """Its effect by patch, (rows, cols); None if tokens have no place in an image."""


N_TILES = 8
"""Number of the strongest latents of each image whose maps are drawn."""
SMALL = 118
"""Width and height of a map, in pixels."""


def draw_attributed(
    output: str, method: str, photographs: Sequence[Photograph], sources: Sequence[Sequence[Source]], notes: Sequence[str]
) -> Page:
    """Draw, for each image, the strongest latents as bars with their exact effects, and where in the image they have their effects.

    Args:
        output: The output, in words.
        method: How effects were computed.
        photographs: The images.
        sources: The strongest latents of each, strongest first.
        notes: Sentences below the drawing.

    Returns:
        The page. It shows at most `MOST_IMAGES` images.
    """
    shown = list(zip(photographs, sources, strict=True))[:MOST_IMAGES]
    lines = [line for note in notes for line in textwrap.wrap(short(f"! {note}", 660), 165)]
    if len(photographs) > len(shown):
        lines.append(f"{len(photographs) - len(shown)} more images are in the table.")
    bars_at = MARGIN + TILE + 190
    tiles_at = bars_at + 260 + 40
    height = 2 * (SMALL + 34) + 24
    page = Page(tiles_at + N_TILES // 2 * (SMALL + GAP) + MARGIN, MARGIN + HEADER + len(shown) * height + 16 * len(lines) + MARGIN)
    page.text(MARGIN, MARGIN - 10, short(" ".join(output.split()), 80), 16, weight="bold")
    page.text(
        MARGIN,
        MARGIN + 24,
        f"{method} effects of the latents that speak most for it (blue) and against it (red); dots are exact",
        9.5,
        GREY,
    )
    page.rule(MARGIN + 50)
    for place, (photograph, of_image) in enumerate(shown):
        y = MARGIN + HEADER + place * height
        page.tile(MARGIN, y, square(photograph.picture, TILE))
        page.text(MARGIN, y + TILE + 6, short(photograph.name, 34), 8.5)
        _draw_bars(page, bars_at, y, of_image)
        for i, source in enumerate([one for one in of_image if one.map is not None][:N_TILES]):
            _draw_map(page, tiles_at + i % (N_TILES // 2) * (SMALL + GAP), y + i // (N_TILES // 2) * (SMALL + 34), photograph, source)
    for i, line in enumerate(lines):
        page.text(MARGIN, MARGIN + HEADER + len(shown) * height + 16 * i, line, 8.5, ALARM)
    return page


def _draw_bars(page: Page, x: int, y: int, sources: Sequence[Source]) -> None:
    sources = sources[:16]
    if not sources:
        page.text(x, y, "no latent has an effect", 9, GREY)
        return
    axes: Any = page.axes(x, y, 260, 17 * len(sources))
    places = range(len(sources))
    axes.barh(places, [one.effect for one in sources], color=[ACCENT if one.effect > 0 else ALARM for one in sources], height=0.6)
    exact = [(one.exact, place) for place, one in enumerate(sources) if one.exact is not None]
    axes.plot([value for value, _ in exact], [place for _, place in exact], "o", color=INK, markersize=3.5)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.invert_yaxis()
    axes.set_yticks(list(places), [short(f"{one.label or ''}  {one.latent}", 26) for one in sources], fontsize=7.5)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.xaxis.get_major_locator().set_params(nbins=4)


def _draw_map(page: Page, x: int, y: int, photograph: Photograph, source: Source) -> None:
    assert source.map is not None
    toward = source.map * (1 if source.effect > 0 else -1)
    page.tile(x, y, photograph.heated(toward.clip(min=0), float(toward.max()), SMALL))
    page.text(x, y + SMALL + 3, short(f"{source.latent} {source.label or ''}", 18), 8, ACCENT if source.effect > 0 else ALARM)
