"""A page in pixels: text, tiles, plots; and how words and numbers are written on it."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ommatid.catalog.whole import write_whole

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
