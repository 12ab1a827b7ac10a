"""A page in pixels: text, plots, and the images on which a latent fires as tiles."""

import io
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ommatid.catalog.reader import Catalog
from ommatid.errors import QueryError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file aside and move it into its place; folders on the way are made.

    Raises:
        QueryError: it cannot be written there.
    """
    aside = path.with_name(path.name + ".tmp")
    if blocked := next((folder for folder in path.parents if folder.exists() and not folder.is_dir()), None):
        raise QueryError(f"{path}: cannot be written: {blocked} is no folder; name another place with --to FILE")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        os.replace(aside, path)
    except OSError as error:
        if aside.is_file():
            aside.unlink()
        raise QueryError(f"{path}: cannot be written: {error.strerror}; name another place with --to FILE") from None


DPI = 100
INK, GREY, FAINT, ACCENT, ALARM = "#1b1e23", "#6a7078", "#d9dce1", "#2b6cb0", "#b42318"
MARGIN = 36


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

    def png(self, density: int = 1) -> bytes:
        """The picture, with so many dots a pixel; only a page without tiles may have more than 1."""
        out = io.BytesIO()
        with warnings.catch_warnings():
            # a label in a script that matplotlib's font lacks is drawn as boxes: no reason to stop
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            self.figure.savefig(out, format="png", dpi=DPI * density, metadata={"Software": None})
        return out.getvalue()

    def save(self, path: Path) -> None:
        """Write the PNG, whole or not at all."""
        write_whole(path, self.png())


def short(text: str, n: int) -> str:
    """The text, cut at n characters."""
    return text if len(text) <= n else text[: n - 1] + "…"


def fixed(value: float | None) -> str:
    """Two decimals, or a dash."""
    return "–" if value is None else f"{value:.2f}"


def percent(value: float) -> str:
    """Of a share, two digits."""
    return f"{100 * value:.2g} %"


HEAT = "inferno"
SIDE = 96
"""Pixels of an example's side."""
GAP = 6
N_ACROSS = 8
"""Examples in a row."""
N_STRONGEST = 16
"""Strongest images of a feature that are shown: those that its purity is about."""


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


def load_examples(catalog: Catalog, feature: Mapping[str, Any]) -> tuple[list[Example], list[Example]]:
    """The strongest images of a feature, N_STRONGEST or all on which it fires; and others, of the lower deciles, strongest decile first."""
    values = {"sae": feature["sae"], "latent": feature["latent"], "n": N_STRONGEST, "n_lower": N_ACROSS}
    found = [_example(*row) for row in catalog.rows(_EXAMPLES, values)]
    return found[:N_STRONGEST], found[N_STRONGEST:]


def _example(decile: int, act: float, heat: list[float] | None, rows: int, cols: int, thumbnail: bytes, *seen: float) -> Example:
    grid = np.array(heat, np.float32).reshape(rows, cols) if heat else None
    return Example(decile, act, grid, Image.open(io.BytesIO(thumbnail)).convert("RGB"), (seen[0], seen[1]))


def places(n: int) -> list[tuple[int, int]]:
    """Left and top pixel of each of n tiles, in rows of N_ACROSS."""
    return [(i % N_ACROSS * (SIDE + GAP), i // N_ACROSS * (SIDE + GAP)) for i in range(n)]


def has_heat(examples: Sequence[Example]) -> bool:
    """Whether any of them has a heat map."""
    return any(example.heat is not None for example in examples)


def square(picture: Image.Image, side: int) -> np.ndarray:
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


def overlaid(example: Example, max_act: float, side: int = SIDE) -> np.ndarray:
    """The picture with its heat over what the model sees of it: colour and opacity grow with activation, from 0 to `max_act`."""
    pixels = square(example.picture, side).astype(np.float32)
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


_EXAMPLES = """
    WITH placed AS (
        SELECT *, row_number() OVER (ORDER BY decile DESC, rank) AS place
        FROM examples
        WHERE sae = $sae AND latent = $latent
    ), lower AS (
        SELECT *, row_number() OVER (PARTITION BY decile ORDER BY rank) AS nth FROM placed WHERE place > $n AND decile < 10
    )
    SELECT decile, act, heat, shown.rows, cols, thumbnail, coalesce(seen_width, 1), coalesce(seen_height, 1)
    FROM (SELECT *, 0 AS nth FROM placed WHERE place <= $n UNION ALL FROM lower WHERE nth <= $n_lower) AS shown JOIN images USING (image)
    ORDER BY place
"""
