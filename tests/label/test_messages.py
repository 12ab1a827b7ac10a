"""Messages to a model hold images that can be decoded, of bounded size and reproducible, with crops that contain what fires."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ommatid.config.label import VlmLabeller
from ommatid.label.grid import GRID_VERSION, N_TILES, SIDE, draw_grid, mark, tile_corner
from ommatid.label.labellers.base import Example
from ommatid.label.labellers.vlm import AnswerCache, Vlm
from support.cases import LEFT, encode, make_case
from support.servers import chatting, names

RED, BLUE, GREEN = (220, 0, 0), (0, 0, 220), (0, 160, 0)


def at(grid: Image.Image, tile: int, x: float, y: float = 0.5) -> tuple[int, ...]:
    """Return the pixel at a position of a tile, given as shares of its width and height."""
    left, top = tile_corner(tile)
    pixel = grid.getpixel((left + int(x * SIDE), top + int(y * SIDE)))
    assert isinstance(pixel, tuple)
    return pixel


def is_near(pixel: tuple[int, ...], colour: tuple[int, ...], tolerance: float = 25) -> bool:
    return float(np.abs(np.subtract(pixel, colour)).max()) <= tolerance


def test_messages_show_whole_images_then_marked_crops_then_silent_images(tmp_path: Path) -> None:
    with chatting(names("red")) as server:
        params = VlmLabeller(kind="vlm", model="tiny", url=server.url)
        Vlm("vlm", params, AnswerCache(tmp_path / "a"), print).answer(make_case(0))
    whole, marked, silent = server.asked[0].images
    for tile in range(5):
        assert is_near(at(whole, tile, 0.2), RED) and is_near(at(whole, tile, 0.8), BLUE)
        # it fires on the left quarter: the crop has that in colour, and what else is in it is faded
        assert is_near(at(marked, tile, 0.1), RED)
        assert is_near(at(marked, tile, 0.45), (142, 109, 109)) and is_near(at(marked, tile, 0.9), (109, 109, 142))
    assert all(is_near(at(silent, tile, 0.5), GREEN) for tile in range(4))
    texts = server.asked[0].text
    assert texts.index("5 images to which") < texts.index("faded to grey") < texts.index("4 images on which the unit")


@pytest.mark.parametrize("heat", [None, np.zeros((4, 4), np.float32)])
def test_without_heat_maps_only_whole_images_are_shown(heat: np.ndarray | None, tmp_path: Path) -> None:
    with chatting(names("red")) as server:
        params = VlmLabeller(kind="vlm", model="tiny", url=server.url)
        Vlm("vlm", params, AnswerCache(tmp_path / "a"), print).answer(make_case(0, n_silent=0, heat=heat))
    assert len(server.asked[0].images) == 1
    assert "faded" not in server.asked[0].text and "silent;" not in server.asked[0].text


def test_everything_that_fires_is_inside_the_crop_and_not_faded() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows, cols = rng.integers(1, 9, 2)
        height, width = rng.integers(30, 120, 2)
        heat = np.zeros((rows, cols), np.float32)
        row, col = rng.integers(rows), rng.integers(cols)
        heat[row, col] = 3.0
        pixels = np.full((height, width, 3), 60, np.uint8)
        y, x = int((row + 0.5) * height / rows), int((col + 0.5) * width / cols)
        pixels[y, x] = 255, 0, 255  # the middle of the patch that fires
        crop = np.asarray(mark(Example(0, encode(pixels), 3.0, heat)))
        assert (np.abs(crop.astype(int) - (255, 0, 255)).max(-1) <= 20).sum() == 1
        assert min(crop.shape[:2]) >= min(height, width) // 2
        assert crop.size <= pixels.size


def test_heat_covers_the_part_of_the_image_that_the_model_sees() -> None:
    pixels = np.zeros((60, 180, 3), np.uint8)
    for i, colour in enumerate((GREEN, RED, BLUE)):
        pixels[:, 60 * i : 60 * i + 60] = colour
    everywhere = Example(0, encode(pixels), 1.0, np.ones((4, 4), np.float32))
    assert np.array_equal(np.asarray(mark(everywhere)), pixels)
    # a centre crop sees the middle third; the left edge of that is red, not green
    left = replace(everywhere, heat=LEFT, seen=(1 / 3, 1.0))
    kept = np.asarray(mark(left)).reshape(-1, 3)
    assert (np.abs(kept.astype(int) - RED).max(1) <= 2).any()
    assert not (np.abs(kept.astype(int) - GREEN).max(1) <= 2).any()


def test_grids_are_small_and_reproducible() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (600, 900, 3), np.uint8)
    tiles = [(i, Image.fromarray(noise)) for i in range(1, N_TILES + 1)]
    grid = draw_grid(tiles)
    assert grid == draw_grid(tiles)
    assert len(grid) < 1_000_000  # of noise, the worst there is
    with Image.open(io.BytesIO(grid)) as image:
        image.load()
        assert image.format == "JPEG" and max(image.size) < 1000
    for size in ((1, 1), (1, 500), (500, 1), (3000, 10)):
        assert draw_grid([(1, Image.new("RGB", size, "red"))])


def test_grids_look_the_same_as_when_their_version_was_last_increased() -> None:
    """Cached answers are about these grids. If a change is intended, increase GRID_VERSION and record the new numbers."""
    examples = make_case(0).firing
    grid = Image.open(io.BytesIO(draw_grid([(i, mark(example)) for i, example in enumerate(examples, start=1)])))
    coarse = np.asarray(grid.convert("L").resize((8, 4), Image.Resampling.BOX)).astype(int)
    assert GRID_VERSION == 1 and grid.size == (808, 452)
    assert np.abs(coarse - EXPECTED).max() <= 3, coarse.tolist()


EXPECTED = np.array(
    [
        [139, 153, 137, 155, 135, 157, 133, 159],
        [104, 121, 101, 124, 99, 126, 96, 129],
        [133, 148, 255, 255, 255, 255, 255, 255],
        [109, 126, 255, 255, 255, 255, 255, 255],
    ]
)
