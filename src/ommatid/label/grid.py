"""Grids of tiles, in which labellers that look at images are shown a latent's examples.

The bytes of a grid depend on nothing but the images and their heat maps, and its size is bounded.
"""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageDraw, ImageFont

from ommatid.images.decode import decode
from ommatid.label.labellers.base import Example

GRID_VERSION = 1
"""Version of the grids; increase it whenever grids look different, so that answers about the old ones are not reused."""
N_TILES = 16
"""Largest number of images in a grid."""
N_ACROSS = 4
"""Tiles in a row."""
SIDE = 192
"""Width and height of a tile, in pixels."""
GAP = 8
"""Pixels between tiles."""
STRIP = 22
"""Height of the strip above a tile that holds its number, in pixels."""
QUALITY = 90
"""Quality of the JPEG."""
KEPT = 0.5
"""Share of the strongest patch's activation above which the image is not faded."""
FADED = 0.15
"""Contrast of the image where nothing fires. It fades to grey, because black would look like night."""
GREY = 128.0
"""Grey value that the image fades to."""


def draw_grid(tiles: Sequence[tuple[int, Image.Image]]) -> bytes:
    """Draw at most `N_TILES` numbered tiles, row by row on white.

    Args:
        tiles: Number and picture of each tile.

    Returns:
        A JPEG file.
    """
    assert 0 < len(tiles) <= N_TILES, f"{len(tiles)} tiles"
    n_across, n_down = min(N_ACROSS, len(tiles)), -(-len(tiles) // N_ACROSS)
    canvas = Image.new("RGB", (GAP + n_across * (SIDE + GAP), GAP + n_down * (STRIP + SIDE + GAP)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=STRIP - 4)
    for i, (number, picture) in enumerate(tiles):
        left, top = tile_corner(i)
        pen.text((left, top - STRIP), str(number), fill="black", font=font)
        tile = _fitted(picture)
        canvas.paste(tile, (left + (SIDE - tile.width) // 2, top + (SIDE - tile.height) // 2))
    out = io.BytesIO()
    canvas.save(out, "JPEG", quality=QUALITY, subsampling=0)
    return out.getvalue()


def tile_corner(i: int) -> tuple[int, int]:
    """Return the left and top pixel of the i-th tile."""
    return GAP + i % N_ACROSS * (SIDE + GAP), GAP + STRIP + i // N_ACROSS * (STRIP + SIDE + GAP)


def choose_tiles(examples: Sequence[Example]) -> Sequence[Example]:
    """Choose as many examples as a grid holds: half of them the strongest, half evenly spread over the others down to the weakest."""
    n_first, n_rest = N_TILES // 2, len(examples) - N_TILES // 2
    if len(examples) <= N_TILES:
        return examples
    places = np.linspace(0, n_rest - 1, N_TILES - n_first).round().astype(int) + n_first
    return [*examples[:n_first], *(examples[i] for i in places)]


def cut(example: Example) -> Image.Image:
    """Return the image cropped around what fires, or the whole image if there is no heat."""
    picture = decode(example.encoded)
    heat = coarse_heat(example)
    return picture if heat is None else picture.crop(_box(_spread_heat(heat, picture.size, example.seen)))


def mark(example: Example) -> Image.Image:
    """Return the image cropped around what fires, with everything else faded to grey, or the whole image if there is no heat."""
    picture = decode(example.encoded)
    heat = coarse_heat(example)
    if heat is None:
        return picture
    share = _spread_heat(heat, picture.size, example.seen)
    light = FADED + (1 - FADED) * np.clip(share / KEPT, 0, 1)[:, :, None]
    faded = np.asarray(picture, np.float32) * light + GREY * (1 - light)
    return Image.fromarray(faded.round().astype(np.uint8)).crop(_box(share))


def coarse_heat(example: Example) -> UInt8[np.ndarray, "rows columns"] | None:
    """Round heat to 255 steps of its maximum, because its last bits differ between machines.

    Returns:
        Heat, `(rows, cols)` uint8; None if there is none or nothing fires.
    """
    if example.heat is None or not (top := float(example.heat.max(initial=0))) > 0:
        return None
    return (np.clip(example.heat / top, 0, 1) * 255).round().astype(np.uint8)


def _spread_heat(
    heat: UInt8[np.ndarray, "rows columns"], size: tuple[int, int], seen: tuple[float, float]
) -> Float32[np.ndarray, "height width"]:
    """Scale heat to the image, `(height, width)`, 0 to 1: interpolated where the model sees the image, and 0 elsewhere."""
    width, height = size
    wide, high = (max(1, round(side * share)) for side, share in zip(size, seen, strict=True))
    inside = Image.fromarray(heat.astype(np.float32) / 255).resize((wide, high), Image.Resampling.BILINEAR)
    left, top = (width - wide) // 2, (height - high) // 2
    share = np.zeros((height, width), np.float32)
    share[top : top + high, left : left + wide] = np.asarray(inside)
    return share


def _box(share: Float32[np.ndarray, "height width"]) -> tuple[int, int, int, int]:
    """Return the square to crop: all that is not faded, with a margin of a tenth of the shorter side, and at least half that side long."""
    height, width = share.shape
    rows, cols = (np.flatnonzero((share >= KEPT * share.max()).any(axis)) for axis in (1, 0))
    margin = min(height, width) // 10
    tall, wide = (int(found[-1] - found[0]) + 1 + 2 * margin for found in (rows, cols))
    side = max(tall, wide, min(height, width) // 2)
    left, right = _stretch(int(cols[0] + cols[-1] + 1) // 2, side, width)
    top, bottom = _stretch(int(rows[0] + rows[-1] + 1) // 2, side, height)
    return left, top, right, bottom


def _stretch(centre: int, length: int, limit: int) -> tuple[int, int]:
    """Return start and end of an interval of a given length around a centre, moved or shortened to lie between 0 and `limit`."""
    length = min(length, limit)
    start = min(max(0, centre - length // 2), limit - length)
    return start, start + length


def _fitted(picture: Image.Image) -> Image.Image:
    """Scale a picture to the size of a tile."""
    scale = SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)
