"""Pictures of features: examples by decile with heat maps, numbers and names, as PNG."""

import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ommatid.catalog import Catalog
from ommatid.errors import QueryError

DPI = 100
INK, GREY, FAINT, ACCENT, ALARM = "#1b1e23", "#6a7078", "#d9dce1", "#2b6cb0", "#b42318"
HEAT = "inferno"
MARGIN = 36
SIDE = 96
"""Pixels of an example's side."""
GAP = 6
N_ACROSS = 8
"""Examples in a row."""
GUTTER = 68
"""Left of the examples, for the name of the decile."""
SIDEBAR = 330
TOP = MARGIN + 74
"""Where the examples begin, below the header."""
N_DECILES = 5
"""Lower deciles that are drawn: 9, 7, 5, 3, 1 of those with examples, so that the page stays one page."""
MIN_IMAGES = 16
"""A feature that fires on fewer images is not among the best: its score rests on too little."""


@dataclass(frozen=True)
class Example:
    """An image on which a latent fires."""

    decile: int
    """10 is the strongest."""
    act: float
    """Image-level activation."""
    heat: np.ndarray | None
    """Activation of each patch (rows, cols), if tokens have a place."""
    picture: Image.Image
    """Thumbnail."""
    seen: tuple[float, float]
    """Share of width and height, about the centre, that the model sees."""


@dataclass(frozen=True)
class Sidebar:
    """What stands beside the examples."""

    acts: list[float]
    """Image-level activation of each image it fires on."""
    classes: list[tuple[Any, ...]]
    """The commonest classes of those images: name, images, share."""
    neighbours: list[tuple[Any, ...]]
    """Nearest latents: latent, cosine, label."""

    @property
    def height(self) -> int:
        """Pixels that a page needs for it."""
        return TOP + (224 if self.acts else 0) + (84 + 20 * len(self.classes)) + (24 + 20 * len(self.neighbours)) + MARGIN


class Page:
    """A white page in pixels, y downwards from the top."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)

    def text(self, x: int, y: int, text: str, size: float = 9, colour: str = INK, **options: Any) -> None:
        """Text whose top (or `va`) is at y; dollars are dollars, not mathematics."""
        options = {"va": "top", "ha": "left"} | options
        self.figure.text(x / self.width, 1 - y / self.height, text, fontsize=size, color=colour, parse_math=False, **options)

    def tile(self, x: int, y: int, pixels: np.ndarray) -> None:
        """An image (height, width, 3), pixel by pixel."""
        self.figure.figimage(pixels, x, self.height - y - pixels.shape[0], zorder=1)

    def axes(self, x: int, y: int, width: int, height: int) -> Any:
        """A plot in a box."""
        axes = self.figure.add_axes((x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height))
        axes.tick_params(labelsize=7.5, colors=GREY, length=3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(FAINT)
        return axes

    def rule(self, y: int) -> None:
        """A faint line across."""
        axes = self.axes(MARGIN, y, self.width - 2 * MARGIN, 1)
        axes.set_axis_off()
        axes.axhline(0, color=FAINT, linewidth=1)

    def save(self, path: Path) -> None:
        """Write the PNG, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".tmp")
        with warnings.catch_warnings():
            # a label in a script that matplotlib's font lacks is drawn as boxes: no reason to stop
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            self.figure.savefig(aside, format="png", dpi=DPI, metadata={"Software": None})
        os.replace(aside, path)


def draw_feature(catalog: Catalog, latent: int, path: Path) -> None:
    """Draw one feature: label and numbers, examples from strong to weak with heat maps, histogram, classes, neighbours.

    Raises:
        QueryError: there is no such latent.
    """
    feature = _feature(catalog, latent)
    examples = _examples(catalog, feature, n_top=2 * N_ACROSS)
    top = [example for example in examples if example.decile == 10]
    lower = [[e for e in examples if e.decile == decile] for decile in _deciles(examples)]
    width = 2 * MARGIN + GUTTER + N_ACROSS * (SIDE + GAP) + 40 + SIDEBAR
    sidebar = _sidebar(catalog, feature)
    page = Page(width, max(_height(top, lower), sidebar.height))
    _draw_header(page, feature)
    _draw_examples(page, top, lower, feature["max_act"])
    _draw_sidebar(page, sidebar, feature, _has_heat(examples))
    page.save(path)


def draw_best(catalog: Catalog, path: Path, n: int = 10) -> None:
    """Draw a contact sheet of the `n` named features with the highest monosemanticity: a row each, with its strongest examples."""
    best = catalog.ask(_BEST, {"n": n, "least": MIN_IMAGES}).dicts()
    row, left = SIDE + 26, 300
    page = Page(2 * MARGIN + left + N_ACROSS * (SIDE + GAP), max(MARGIN + 46 + len(best) * row + 10, 160))
    page.text(MARGIN, MARGIN - 10, "Most monosemantic features", 15, weight="bold")
    page.text(MARGIN, MARGIN + 16, _caption(best), 9, GREY)
    for index, feature in enumerate(best):
        y = MARGIN + 50 + index * row
        _draw_name(page, y, left, feature)
        for i, example in enumerate(_examples(catalog, feature, n_top=N_ACROSS)[:N_ACROSS]):
            page.tile(MARGIN + left + i * (SIDE + GAP), y, _overlaid(example, feature["max_act"]))
    page.save(path)


# ---- what is drawn


def _feature(catalog: Catalog, latent: int) -> dict[str, Any]:
    found = catalog.ask("SELECT * FROM features WHERE latent = $latent ORDER BY sae", {"latent": latent}, max_rows=1).dicts()
    if found:
        return found[0]
    ((lowest, highest),) = catalog.rows("SELECT min(latent), max(latent) FROM features")
    raise QueryError(f"no latent {latent}; the catalogue has {lowest} to {highest}")


def _examples(catalog: Catalog, feature: dict[str, Any], n_top: int) -> list[Example]:
    """Decile 10 first, by rank."""
    values = {"sae": feature["sae"], "latent": feature["latent"], "n_top": n_top, "n_lower": N_ACROSS}
    return [_example(*row) for row in catalog.rows(_EXAMPLES, values)]


def _example(decile: int, act: float, heat: list[float] | None, rows: int, cols: int, thumbnail: bytes, *seen: float) -> Example:
    grid = np.array(heat, np.float32).reshape(rows, cols) if heat else None
    return Example(decile, act, grid, Image.open(io.BytesIO(thumbnail)).convert("RGB"), (seen[0], seen[1]))


def _deciles(examples: Sequence[Example]) -> list[int]:
    """At most N_DECILES of the lower deciles that have examples, evenly spread, strongest first."""
    found = sorted({e.decile for e in examples if e.decile < 10}, reverse=True)
    if len(found) <= N_DECILES:
        return found
    return [found[round(i * (len(found) - 1) / (N_DECILES - 1))] for i in range(N_DECILES)]


def _square(picture: Image.Image, side: int) -> np.ndarray:
    """The picture fitted into a light square; pixels stay sharp when it grows."""
    width, height = _fitted(picture, side)
    filter_ = Image.Resampling.NEAREST if width > picture.width else Image.Resampling.LANCZOS
    canvas = Image.new("RGB", (side, side), "#eef0f2")
    canvas.paste(picture.resize((width, height), filter_), ((side - width) // 2, (side - height) // 2))
    return np.asarray(canvas)


def _fitted(picture: Image.Image, side: int) -> tuple[int, int]:
    """Width and height of the picture inside a square."""
    scale = side / max(picture.size)
    return max(1, round(picture.width * scale)), max(1, round(picture.height * scale))


def _overlaid(example: Example, max_act: float, side: int = SIDE) -> np.ndarray:
    """The picture with its heat over what the model sees of it: colour and opacity grow with activation, from 0 to `max_act`."""
    pixels = _square(example.picture, side).astype(np.float32)
    if example.heat is None or max_act <= 0:
        return pixels.astype(np.uint8)
    width, height = (max(1, round(a * share)) for a, share in zip(_fitted(example.picture, side), example.seen, strict=True))
    heat = np.asarray(Image.fromarray(example.heat).resize((width, height), Image.Resampling.BILINEAR))
    share = np.clip(heat / max_act, 0, 1)
    colour = colormaps[HEAT](share)[:, :, :3] * 255
    # never opaque, so that the image stays visible under its own heat; a little dimmed where it is cold, so that warm stands out
    alpha = (0.15 + 0.5 * share)[:, :, None]
    top, left = (side - height) // 2, (side - width) // 2
    place = pixels[top : top + height, left : left + width]
    place[:] = place * (1 - alpha) + colour * alpha
    return pixels.astype(np.uint8)


# ---- the page of one feature


def _height(top: Sequence[Example], lower: Sequence[Sequence[Example]]) -> int:
    return TOP + -(-len(top) // N_ACROSS) * _pair_height(top) + len(lower) * (SIDE + 24) + MARGIN // 2


def _pair_height(examples: Sequence[Example]) -> int:
    """A row of pictures, over a row of heat maps if there are any, over their activations."""
    return (2 * SIDE + 2 if _has_heat(examples) else SIDE) + 24


def _has_heat(examples: Sequence[Example]) -> bool:
    return any(example.heat is not None for example in examples)


def _draw_header(page: Page, feature: dict[str, Any]) -> None:
    label = feature["label"] or f"no label: {(feature['label_status'] or 'no labeller was asked').replace('_', ' ')}"
    page.text(MARGIN, MARGIN - 10, _short(label, 60), 20, INK if feature["label"] else GREY, weight="bold")
    page.text(page.width - MARGIN, MARGIN - 4, f"latent {feature['latent']}", 14, GREY, ha="right")
    page.text(MARGIN, MARGIN + 30, "     ".join(_numbers(feature)), 10.5, GREY)
    if feature["is_dead"]:
        page.text(
            page.width - MARGIN, MARGIN + 28, "dead: fires on no image of the evaluation split", 10.5, ALARM, ha="right", weight="bold"
        )
    page.rule(MARGIN + 58)


def _numbers(feature: dict[str, Any]) -> list[str]:
    score = f"label score {_fixed(feature['label_score'])}"
    if feature["control_score"] is not None:
        score += f" (another's label {_fixed(feature['control_score'])})"
    return [
        score,
        f"MS {_fixed(feature['ms'])} (floor {_fixed(feature['ms_floor'])}, judge {feature['judge']})",
        f"density {_percent(feature['density'])}",
        f"purity {_fixed(feature['purity'])}",
        f"fires on {feature['n_images']:,} images",
    ]


def _draw_examples(page: Page, top: Sequence[Example], lower: Sequence[Sequence[Example]], max_act: float) -> None:
    y = TOP
    if not top:
        page.text(MARGIN, y + 10, "No examples: it fires on no image.", 11, GREY)
    for start in range(0, len(top), N_ACROSS):
        page.text(MARGIN, y + 2, "decile 10" if start == 0 else "", 8.5, GREY)
        _draw_pairs(page, y, top[start : start + N_ACROSS], max_act)
        y += _pair_height(top)
    for examples in lower:
        page.text(MARGIN, y + 2, f"decile {examples[0].decile}", 8.5, GREY)
        _draw_side_by_side(page, y, examples, max_act)
        y += SIDE + 24


def _draw_pairs(page: Page, y: int, examples: Sequence[Example], max_act: float) -> None:
    """Pictures, and below each its heat map and activation."""
    for i, example in enumerate(examples):
        x = MARGIN + GUTTER + i * (SIDE + GAP)
        page.tile(x, y, _square(example.picture, SIDE))
        if _has_heat(examples):
            page.tile(x, y + SIDE + 2, _overlaid(example, max_act))
        page.text(x, y + _pair_height(examples) - 21, f"{example.act:.2f}", 8, GREY)


def _draw_side_by_side(page: Page, y: int, examples: Sequence[Example], max_act: float) -> None:
    """Picture and heat map beside each other, as many as fit."""
    step = 2 if _has_heat(examples) else 1
    for i, example in enumerate(examples[: N_ACROSS // step]):
        x = MARGIN + GUTTER + i * step * (SIDE + GAP)
        page.tile(x, y, _square(example.picture, SIDE))
        if step == 2:
            page.tile(x + SIDE + 2, y, _overlaid(example, max_act))
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
    """The colours of the heat maps."""
    page.text(x, y, "heat", 8.5, GREY)
    page.text(x + 56, y, "0", 8.5, GREY, ha="right")
    ramp = colormaps[HEAT](np.linspace(0, 1, 200))[:, :3] * 255
    page.tile(x + 64, y + 1, np.broadcast_to(ramp.astype(np.uint8), (11, 200, 3)))
    page.text(x + 272, y, f"{max_act:.2f}", 8.5, GREY)


def _draw_histogram(page: Page, x: int, y: int, acts: Sequence[float]) -> None:
    page.text(x, y, "Activation over the images it fires on", 10, weight="bold")
    axes = page.axes(x + 30, y + 24, SIDEBAR - 30, 120)
    axes.hist(acts, bins=30, range=(0, max(acts)), color=ACCENT)
    axes.set_ylabel("images", fontsize=7.5, color=GREY)
    axes.set_xlim(0, max(acts))
    axes.yaxis.get_major_locator().set_params(integer=True, nbins=4)


def _draw_classes(page: Page, x: int, y: int, classes: Sequence[tuple[Any, ...]], strongest: Sequence[str] | None) -> None:
    """Bars of the commonest classes."""
    page.text(x, y, "Classes of those images", 10, weight="bold")
    for i, (name, n, share) in enumerate(classes):
        at = y + 24 + 20 * i
        page.text(x + 104, at, _short(name, 16), 8.5, ha="right")
        axes = page.axes(x + 112, at + 1, 140, 11)
        axes.set_axis_off()
        axes.set_xlim(0, 1)
        axes.barh([0, 0], [1, share], color=["#eef0f2", ACCENT])
        page.text(x + SIDEBAR, at, f"{n:,} · {share:.0%}", 8.5, GREY, ha="right")
    if strongest:
        page.text(x, y + 30 + 20 * len(classes), _short(f"of the 16 strongest: {', '.join(strongest)}", 54), 8.5, GREY)


def _draw_neighbours(page: Page, x: int, y: int, neighbours: Sequence[tuple[Any, ...]]) -> None:
    page.text(x, y, "Nearest directions", 10, weight="bold")
    page.text(x + SIDEBAR, y + 1, "cosine", 8.5, GREY, ha="right")
    for i, (other, cosine, label) in enumerate(neighbours):
        at = y + 24 + 20 * i
        page.text(x + 44, at, f"{other}", 8.5, GREY, ha="right")
        page.text(x + 56, at, _short(label or "no label", 34), 8.5, INK if label else GREY)
        page.text(x + SIDEBAR, at, _fixed(cosine), 8.5, GREY, ha="right")


# ---- the contact sheet


def _caption(best: Sequence[dict[str, Any]]) -> str:
    if not best:
        return f"No latent has a label and fires on {MIN_IMAGES} images or more."
    floor, judge = best[0]["ms_floor"], best[0]["judge"]
    return (
        f"with a label, firing on {MIN_IMAGES} images or more; each row: its strongest evaluation images under the latent's heat map. "
        f"Judge {judge}, floor {_fixed(floor)}"
    )


def _draw_name(page: Page, y: int, width: int, feature: dict[str, Any]) -> None:
    page.text(MARGIN, y + 4, _short(feature["label"], 28), 12.5, weight="bold")
    page.text(MARGIN, y + 30, f"MS {_fixed(feature['ms'])}    label score {_fixed(feature['label_score'])}", 10)
    page.text(
        MARGIN, y + 52, f"latent {feature['latent']} · density {_percent(feature['density'])} · {feature['n_images']:,} images", 8.5, GREY
    )


# ---- words and numbers


def _short(text: str, n: int) -> str:
    return text if len(text) <= n else text[: n - 1] + "…"


def _fixed(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %"


_BEST = """
    SELECT * FROM features
    WHERE label IS NOT NULL AND NOT is_dead AND ms IS NOT NULL AND n_images >= $least
    ORDER BY ms DESC, latent LIMIT $n
"""
_EXAMPLES = """
    SELECT decile, act, heat, examples.rows, cols, thumbnail, coalesce(seen_width, 1), coalesce(seen_height, 1)
    FROM examples JOIN images USING (image)
    WHERE sae = $sae AND latent = $latent AND rank <= CASE decile WHEN 10 THEN $n_top ELSE $n_lower END
    ORDER BY decile DESC, rank
"""
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
