"""A page to draw on, and the tiles that show the images on which a latent fires."""

import io
import os
import tempfile
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


def write_whole(path: Path, content: bytes, option: str = "--to") -> None:
    """Write a file under another name and move it into place, so that it is whole or not there. Missing folders are created.

    Args:
        path: The file.
        content: Its content.
        option: Option of the command line that names the file, for the error.

    Raises:
        QueryError: The file cannot be written there.
    """
    check_place(path, option)
    aside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        os.replace(aside, path)
    except OSError as error:
        if aside.is_file():
            aside.unlink()
        raise QueryError(f"{path}: cannot be written: {error.strerror}; name another place with {option} FILE") from None


def check_place(path: Path, option: str = "--to") -> None:
    """Check that a file can be written somewhere, before the work whose result it will hold; it leaves nothing there.

    Raises:
        QueryError: The file cannot be written there.
    """
    folder = next(folder for folder in path.parents if folder.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        why = error.strerror if folder.is_dir() else f"{folder} is not a folder"
        raise QueryError(f"{path}: cannot be written: {why}; name another place with {option} FILE") from None


DPI = 100
"""Pixels per inch, by which matplotlib scales text."""
INK, GREY, FAINT, ACCENT, ALARM = "#1b1e23", "#6a7078", "#d9dce1", "#2b6cb0", "#b42318"
MARGIN = 36
"""Margin of a page, in pixels."""


class Page:
    """A white page; coordinates are in pixels, from the top left corner."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)

    def text(self, x: int, y: int, text: str, size: float = 9, colour: str = INK, **options: Any) -> None:
        """Write text with its top left corner at a place, unless `ha` or `va` say otherwise. Dollar signs do not start a formula."""
        options = {"va": "top", "ha": "left"} | options
        self.figure.text(x / self.width, 1 - y / self.height, text, fontsize=size, color=colour, parse_math=False, **options)

    def tile(self, x: int, y: int, pixels: np.ndarray) -> None:
        """Draw an image, `(height, width, 3)`, without scaling it."""
        self.figure.figimage(pixels, x, self.height - y - pixels.shape[0], zorder=1)

    def axes(self, x: int, y: int, width: int, height: int) -> Any:
        """Add a plot that fills a box."""
        axes = self.figure.add_axes((x / self.width, 1 - (y + height) / self.height, width / self.width, height / self.height))
        axes.tick_params(labelsize=7.5, colors=GREY, length=3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(FAINT)
        return axes

    def rule(self, y: int) -> None:
        """Draw a faint line across the page."""
        axes = self.axes(MARGIN, y, self.width - 2 * MARGIN, 1)
        axes.set_axis_off()
        axes.axhline(0, color=FAINT, linewidth=1)

    def png(self, density: int = 1) -> bytes:
        """Return the page as PNG, with `density` dots per pixel, which must be 1 if the page has tiles."""
        out = io.BytesIO()
        with warnings.catch_warnings():
            # Labels in a script that matplotlib's font lacks are drawn as boxes, which is no reason to stop.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            self.figure.savefig(out, format="png", dpi=DPI * density, metadata={"Software": None})
        return out.getvalue()

    def save(self, path: Path) -> None:
        """Write the page as PNG.

        Raises:
            QueryError: The file cannot be written.
        """
        write_whole(path, self.png())


def short(text: str, n: int) -> str:
    """Return a text, cut to n characters."""
    return text if len(text) <= n else text[: n - 1] + "…"


def fixed(value: float | None) -> str:
    """Write a number with two decimals, or None as a dash."""
    return "–" if value is None else f"{value:.2f}"


def percent(value: float) -> str:
    """Write a share as a percentage with two digits."""
    return f"{100 * value:.2g} %"


HEAT = "inferno"
"""Colour map of heat maps."""
SIDE = 96
"""Width and height of an example, in pixels."""
GAP = 6
"""Pixels between examples."""
N_ACROSS = 8
"""Examples in a row."""
N_STRONGEST = 16
"""Number of strongest images shown of a feature; they are the images on which its purity is based."""


@dataclass(frozen=True)
class Example:
    """An image on which a latent fires."""

    decile: int
    """Decile of the activation; 10 is the strongest."""
    act: float
    """Image-level activation."""
    heat: np.ndarray | None
    """Activation of each patch, `(rows, cols)` float32; None if tokens have no place in the image."""
    picture: Image.Image
    """Thumbnail of the image."""
    seen: tuple[float, float]
    """Share of the image's width and height, around its centre, that the model sees."""


def load_examples(catalog: Catalog, feature: Mapping[str, Any]) -> tuple[list[Example], list[Example]]:
    """Load the examples of a feature.

    Args:
        catalog: The open catalogue.
        feature: Row of the relation `features`, by column.

    Returns:
        The `N_STRONGEST` strongest images, and examples from lower deciles, strongest decile first.
    """
    values = {"sae": feature["sae"], "latent": feature["latent"], "n": N_STRONGEST, "n_lower": N_ACROSS}
    found = [_example(*row) for row in catalog.rows(_EXAMPLES, values)]
    return found[:N_STRONGEST], found[N_STRONGEST:]


def _example(decile: int, act: float, heat: list[float] | None, rows: int, cols: int, thumbnail: bytes, *seen: float) -> Example:
    grid = np.array(heat, np.float32).reshape(rows, cols) if heat else None
    return Example(decile, act, grid, Image.open(io.BytesIO(thumbnail)).convert("RGB"), (seen[0], seen[1]))


def places(n: int) -> list[tuple[int, int]]:
    """Return the left and top pixel of each of n tiles, in rows of `N_ACROSS`."""
    return [(i % N_ACROSS * (SIDE + GAP), i // N_ACROSS * (SIDE + GAP)) for i in range(n)]


def has_heat(examples: Sequence[Example]) -> bool:
    """Return whether any example has a heat map."""
    return any(example.heat is not None for example in examples)


def square(picture: Image.Image, side: int) -> np.ndarray:
    """Fit a picture into a light grey square, `(side, side, 3)` uint8; if it is enlarged, its pixels stay sharp."""
    width, height = _fitted(picture, side)
    filter_ = Image.Resampling.NEAREST if width > picture.width else Image.Resampling.LANCZOS
    canvas = Image.new("RGB", (side, side), "#eef0f2")
    canvas.paste(picture.resize((width, height), filter_), ((side - width) // 2, (side - height) // 2))
    return np.asarray(canvas)


def _fitted(picture: Image.Image, side: int) -> tuple[int, int]:
    """Return the width and height of a picture that is fitted into a square."""
    scale = side / max(picture.size)
    return max(1, round(picture.width * scale)), max(1, round(picture.height * scale))


def overlaid(example: Example, max_act: float, side: int = SIDE) -> np.ndarray:
    """Draw an example's heat map over the part of the picture that the model sees.

    Args:
        example: The example.
        max_act: Activation at which colour and opacity reach their maximum.
        side: Width and height of the result, in pixels.

    Returns:
        The picture, `(side, side, 3)` uint8.
    """
    pixels = square(example.picture, side).astype(np.float32)
    if example.heat is None or max_act <= 0:
        return pixels.astype(np.uint8)
    width, height = (max(1, round(a * share)) for a, share in zip(_fitted(example.picture, side), example.seen, strict=True))
    heat = np.asarray(Image.fromarray(example.heat).resize((width, height), Image.Resampling.BILINEAR))
    share = np.clip(heat / max_act, 0, 1)
    colour = colormaps[HEAT](share)[:, :, :3] * 255
    # Never opaque, so that the image stays visible; slightly dimmed where nothing fires, so that the rest stands out.
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
