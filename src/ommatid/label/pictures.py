"""Grids of images that a model is shown: whole images, and crops that keep only what a latent fires on.

The bytes follow from the images and the heat alone, and their size is bounded whatever the images' is.
"""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ommatid.images.decode import decode
from ommatid.label.labeller import Example

DRAWING = 1
"""Raised when grids look different from before: answers to the old ones are then asked for again."""
N_TILES = 16
"""Images in a grid, at most."""
N_ACROSS = 4
SIDE = 192
"""Pixels of a tile's side."""
GAP = 8
STRIP = 22
"""Pixels above a tile for its number."""
QUALITY = 90
KEPT = 0.5
"""Share of the strongest patch's activation from which the image stays as it is."""
FADED = 0.15
"""What is left of the image's contrast where nothing fires; the rest is grey, for black would look like night."""
GREY = 128.0


def draw_grid(tiles: Sequence[tuple[int, Image.Image]]) -> bytes:
    """A JPEG of numbered tiles, row by row on white, at most `N_TILES`."""
    assert 0 < len(tiles) <= N_TILES, f"{len(tiles)} tiles"
    n_across, n_down = min(N_ACROSS, len(tiles)), -(-len(tiles) // N_ACROSS)
    canvas = Image.new("RGB", (GAP + n_across * (SIDE + GAP), GAP + n_down * (STRIP + SIDE + GAP)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=STRIP - 4)
    for i, (number, picture) in enumerate(tiles):
        left, top = place_of(i)
        pen.text((left, top - STRIP), str(number), fill="black", font=font)
        tile = _fitted(picture)
        canvas.paste(tile, (left + (SIDE - tile.width) // 2, top + (SIDE - tile.height) // 2))
    out = io.BytesIO()
    canvas.save(out, "JPEG", quality=QUALITY, subsampling=0)
    return out.getvalue()


def place_of(i: int) -> tuple[int, int]:
    """Left and top pixel of the i-th tile."""
    return GAP + i % N_ACROSS * (SIDE + GAP), GAP + STRIP + i // N_ACROSS * (STRIP + SIDE + GAP)


def choose_shown(examples: Sequence[Example]) -> Sequence[Example]:
    """As many as a grid holds: the first half of it is the strongest, the other half goes evenly down to the weakest."""
    n_first, n_rest = N_TILES // 2, len(examples) - N_TILES // 2
    if len(examples) <= N_TILES:
        return examples
    places = np.linspace(0, n_rest - 1, N_TILES - n_first).round().astype(int) + n_first
    return [*examples[:n_first], *(examples[i] for i in places)]


def cut(example: Example) -> Image.Image:
    """The image cut around what fires; without heat it stays whole."""
    picture = decode(example.encoded)
    heat = coarse_heat(example)
    return picture if heat is None else picture.crop(_box(_spread(heat, picture.size, example.seen)))


def mark(example: Example) -> Image.Image:
    """The image cut around what fires, everything else in it faded to grey; without heat it stays whole."""
    picture = decode(example.encoded)
    heat = coarse_heat(example)
    if heat is None:
        return picture
    share = _spread(heat, picture.size, example.seen)
    light = FADED + (1 - FADED) * np.clip(share / KEPT, 0, 1)[:, :, None]
    faded = np.asarray(picture, np.float32) * light + GREY * (1 - light)
    return Image.fromarray(faded.round().astype(np.uint8)).crop(_box(share))


def coarse_heat(example: Example) -> np.ndarray | None:
    """Heat in 255 steps of its maximum, (rows, cols) uint8: what is drawn, without the last bits, which differ between machines."""
    if example.heat is None or not (top := float(example.heat.max(initial=0))) > 0:
        return None
    return (np.clip(example.heat / top, 0, 1) * 255).round().astype(np.uint8)


def _spread(heat: np.ndarray, size: tuple[int, int], seen: tuple[float, float]) -> np.ndarray:
    """Heat over the whole image, (height, width) 0 to 1: smooth inside what the model sees of it, 0 around that."""
    width, height = size
    wide, high = (max(1, round(side * share)) for side, share in zip(size, seen, strict=True))
    inside = Image.fromarray(heat.astype(np.float32) / 255).resize((wide, high), Image.Resampling.BILINEAR)
    left, top = (width - wide) // 2, (height - high) // 2
    share = np.zeros((height, width), np.float32)
    share[top : top + high, left : left + wide] = np.asarray(inside)
    return share


def _box(share: np.ndarray) -> tuple[int, int, int, int]:
    """A square around all that is kept, with a tenth of the image as margin, half the image's shorter side at least."""
    height, width = share.shape
    rows, cols = (np.flatnonzero((share >= KEPT * share.max()).any(axis)) for axis in (1, 0))
    margin = min(height, width) // 10
    tall, wide = (int(found[-1] - found[0]) + 1 + 2 * margin for found in (rows, cols))
    side = max(tall, wide, min(height, width) // 2)
    left, right = _stretch(int(cols[0] + cols[-1] + 1) // 2, side, width)
    top, bottom = _stretch(int(rows[0] + rows[-1] + 1) // 2, side, height)
    return left, top, right, bottom


def _stretch(centre: int, length: int, limit: int) -> tuple[int, int]:
    length = min(length, limit)
    start = min(max(0, centre - length // 2), limit - length)
    return start, start + length


def _fitted(picture: Image.Image) -> Image.Image:
    """The picture as large as a tile holds it."""
    scale = SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)
