"""Pictures of images in pages: thumbnails with their heat maps, which a browser draws over them."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BOX = 112
"""Longest side of a picture in a page, in pixels."""


@dataclass(frozen=True)
class Tile:
    """An image in a page, with the heat map of a latent."""

    image: int
    """Number of the image."""
    hash: str
    """Beginning of the image's checksum."""
    act: float | None
    """Activation of the latent on the image; None if it is not about a latent."""
    label: str | None
    """Class of the image; None if it has none."""
    width: int
    """Width in the page, in pixels."""
    height: int
    """Height in the page, in pixels."""
    is_small: bool
    """Whether the image itself has so few pixels that they should stay sharp when enlarged."""
    heat: str | None = None
    """Heat map as base64 of a byte for each patch, row by row, 255 at the latent's largest activation; None if there is none."""
    rows: int = 0
    cols: int = 0
    seen: str = "1 1"
    """Share of width and height, around the centre, that the heat map covers."""
    note: str = ""
    """What is written below the image; empty: the activation."""


def make_tile(row: Mapping[str, Any], scale: float | None = None, box: int = BOX, note: str = "") -> Tile:
    """Make a tile.

    Args:
        row: `image`, `hash`, `label`, `width` and `height`, and if there is a heat map `act`, `heat`, `rows`, `cols`, `seen_width` and
            `seen_height`, as the relations `examples` and `images` have them.
        scale: Activation at which the heat map reaches its full strength; None for no heat map.
        box: Longest side in the page, in pixels.
        note: What is written below the image; empty: the activation.
    """
    width, height = fit(row["width"], row["height"], box)
    heat = encode(row["heat"], scale) if row.get("heat") and scale else None
    return Tile(
        image=row["image"],
        hash=row["hash"],
        act=row.get("act"),
        label=row["label"],
        width=width,
        height=height,
        is_small=max(row["width"], row["height"]) < box,
        heat=heat,
        rows=row["rows"] if heat else 0,
        cols=row["cols"] if heat else 0,
        seen=f"{row['seen_width'] or 1:.4g} {row['seen_height'] or 1:.4g}" if heat else "1 1",
        note=note,
    )


def fit(width: int, height: int, box: int) -> tuple[int, int]:
    """Return width and height of an image that is fitted into a square."""
    scale = box / max(width, height, 1)
    return max(1, round(width * scale)), max(1, round(height * scale))


def encode(heat: Sequence[float], scale: float) -> str:
    """Write a heat map as base64 of a byte for each patch, 255 at `scale`."""
    return base64.b64encode(np.clip(np.asarray(heat, np.float32) * (255 / scale), 0, 255).round().astype(np.uint8).tobytes()).decode()


def draw_svg(heat: str, rows: int, cols: int, seen: tuple[float, float] = (1, 1), threshold: float = 0.3) -> str:
    """Draw a heat map as SVG of an image's shape, for browsers without JavaScript.

    Args:
        heat: What `encode` returned.
        rows: Rows of patches.
        cols: Columns of patches.
        seen: Share of the image's width and height, around the centre, that the patches cover.
        threshold: Share of the latent's largest activation from which a patch is coloured.
    """
    values = np.frombuffer(base64.b64decode(heat), np.uint8).reshape(rows, cols)
    squares = "".join(
        f'<rect x="{col}" y="{row}" width="1" height="1" fill="#ff8c1a" fill-opacity="{0.25 + 0.45 * values[row, col] / 255:.2f}"/>'
        for row, col in zip(*np.nonzero(values > 255 * threshold), strict=True)
    )
    width, height = cols / seen[0], rows / seen[1]
    view = f"{(cols - width) / 2:.3f} {(rows - height) / 2:.3f} {width:.3f} {height:.3f}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}" preserveAspectRatio="none">{squares}</svg>'
