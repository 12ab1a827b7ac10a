"""Images on which a latent fires, as tiles, with and without the heat of its patches."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image

from ommatid.catalog import Catalog

HEAT = "inferno"
SIDE = 96
"""Pixels of an example's side."""
GAP = 6
N_ACROSS = 8
"""Examples in a row."""


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


def load_examples(catalog: Catalog, feature: dict[str, Any], n_top: int) -> list[Example]:
    """Decile 10 first, by rank."""
    values = {"sae": feature["sae"], "latent": feature["latent"], "n_top": n_top, "n_lower": N_ACROSS}
    return [_example(*row) for row in catalog.rows(_EXAMPLES, values)]


def _example(decile: int, act: float, heat: list[float] | None, rows: int, cols: int, thumbnail: bytes, *seen: float) -> Example:
    grid = np.array(heat, np.float32).reshape(rows, cols) if heat else None
    return Example(decile, act, grid, Image.open(io.BytesIO(thumbnail)).convert("RGB"), (seen[0], seen[1]))


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
    SELECT decile, act, heat, examples.rows, cols, thumbnail, coalesce(seen_width, 1), coalesce(seen_height, 1)
    FROM examples JOIN images USING (image)
    WHERE sae = $sae AND latent = $latent AND rank <= CASE decile WHEN 10 THEN $n_top ELSE $n_lower END
    ORDER BY decile DESC, rank
"""
