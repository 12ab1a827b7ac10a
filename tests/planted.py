"""A planted bright patch, from image files to the artefact of activations."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fakes import make_artefact, make_test_params
from PIL import Image
from torch import Tensor

from ommatid.activations.columns import from_float16
from ommatid.extract.stage import extract
from ommatid.images import make_images
from ommatid.store import Artefact
from ommatid.vlm import VisionModel

HOOKPOINT = "vision.blocks.0"
LITE = {"kind": "lite", "variant": "lite0", "image_size": 64}


def check_planted_patch_in_artefact(root: Path, vision: VisionModel, model: Mapping[str, Any]) -> None:
    """Of black images, one of them with one white patch for each place, the artefact's tokens differ most at that row and column.

    Args:
        root: An empty folder.
        vision: The model, which tells its grid and its preprocessing: images are larger, and the patch goes through resize and crop.
        model: The same as params, on which the stages are run.
    """
    places = _draw(root / "photographs", vision)
    params = make_test_params(
        images={"source": {"kind": "folder", "path": str(root / "photographs")}, "limit": None, "eval_share": 0.4},
        extract={"model": model, "hookpoints": [HOOKPOINT], "tokens": "all", "judge": LITE, "namer": LITE, "dtype": "float32"},
    )
    images = make_artefact(root / "images", "images", make_images, params.images, {})
    extraction = make_artefact(root / "extraction", "extraction", extract, params.extract, {"images": images})
    tokens = _patches(extraction.child(HOOKPOINT, "activations"), images)
    dark = tokens.pop("dark.png")
    assert len(tokens) == len(places) == len(dark)
    for name, patches in tokens.items():
        brightest = max(dark, key=lambda place: float((patches[place] - dark[place]).norm()))
        assert brightest == places[name]


def _draw(folder: Path, vision: VisionModel) -> dict[str, tuple[int, int]]:
    """A black image, and for each place of the grid one with a white patch; the place by the file's name."""
    height, width = (side * 3 // 2 for side in vision.preprocess.crop)
    rows, cols = vision.hookpoints[HOOKPOINT].grid or (0, 0)
    left, top, right, bottom = vision.preprocess.box(width, height)
    y, x = (bottom - top) / rows, (right - left) / cols
    folder.mkdir()
    Image.new("RGB", (width, height)).save(folder / "dark.png")
    places = {f"{row} {col}.png": (row, col) for row in range(rows) for col in range(cols)}
    for name, (row, col) in places.items():
        image = Image.new("RGB", (width, height))
        corners = (left + x * col, top + y * row, left + x * (col + 1), top + y * (row + 1))
        image.paste((255, 255, 255), tuple(round(corner) for corner in corners))
        image.save(folder / name)
    return places


def _patches(activations: Artefact, images: Artefact) -> dict[str, dict[tuple[int, int], Tensor]]:
    """Activations of patches by the image's file name, and by row and column."""
    names = dict(zip(*(images.read("images")[column].to_pylist() for column in ("image", "path")), strict=True))
    found: dict[str, dict[tuple[int, int], Tensor]] = {name: {} for name in names.values()}
    for part in itertools.chain(activations.iter_parts("train"), activations.iter_parts("eval")):
        columns = (part[column].to_pylist() for column in ("image", "kind", "row", "col"))
        for image, kind, row, col, x in zip(*columns, from_float16(part["x"]).float(), strict=True):
            if kind == "patch":
                found[names[image]][row, col] = x
    return found
