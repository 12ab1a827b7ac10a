"""Images on which a latent fires, as tiles, with and without the heat of its patches."""

import io
from collections.abc import Mapping, Sequence
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
