"""Masks keep the classes of pixels through resizing, cropping and reduction to patches, and are refused if they do not fit their image.

The stage `sources` follows their content, so that DVC runs the stage again when a mask changes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ommatid.config import Params
from ommatid.errors import ConfigError, SourceError
from ommatid.images.figure import SHAPES, draw, draw_mask, make_figure
from ommatid.images.stage import run as make_images
from ommatid.intervene.masks import Masks
from ommatid.metrics.interventions import activation_outside
from ommatid.sources.stage import write_sources
from ommatid.store import Artefact
from ommatid.vlm.preprocess import Preprocess
from support.study import make_artefact, make_test_params

WHOLE = Preprocess((32, 48), (32, 48), "bicubic", (0, 0, 0), (1, 1, 1))
GRID = (2, 3)
PATHS = ("cat/b.webp", "dog/a.jpg", "wide.png")
SIZES = ((48, 32), (48, 32), (96, 32))


def make_params(folder: Path, masks: str | None = None) -> Params:
    source = {"kind": "folder", "path": str(folder / "photos")}
    return make_test_params(images={"source": source, "limit": None}, intervene={"masks": masks})


@pytest.fixture
def images(tmp_path: Path) -> Artefact:
    rng = np.random.default_rng(0)
    for path, (width, height) in zip(PATHS, SIZES, strict=True):
        (tmp_path / "photos" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(tmp_path / "photos" / path)
    return make_artefact(tmp_path / "images", "images", make_images, make_params(tmp_path).images, {})


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., str]:
    """Saves masks, given as arrays or pictures by file name, and returns their folder."""

    def save(**masks: Any) -> str:
        folder = tmp_path / "masks"
        for name, mask in masks.items():
            path = folder / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            (mask if isinstance(mask, Image.Image) else Image.fromarray(np.asarray(mask, np.uint8))).save(path)
        return str(folder)

    return save


def tiles(*classes: int, side: int = 16) -> np.ndarray:
    return np.array(classes).reshape(GRID).repeat(side, 0).repeat(side, 1)


def test_each_image_gets_the_mask_of_its_name_and_those_without_are_counted(images: Artefact, save: Callable[..., str]) -> None:
    masks = Masks(
        save(cat__b_png=tiles(0, 1, 2, 3, 4, 5), dog__a_png=tiles(9, 9, 9, 9, 9, 9), dog__a_jpg_png=tiles(1, 0, 0, 0, 0, 7)), images
    )
    found = masks.load([1, 2, 0], WHOLE, GRID)
    assert found.numbers.tolist() == [1, 0] and masks.n_missing == 1 and 2 not in masks
    assert found.classes.tolist() == [[1, 0, 0, 0, 0, 7], [0, 1, 2, 3, 4, 5]]
    assert found.objects.tolist() == [[1, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1]]
    assert masks.name(7) == "7"


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_a_mask_of_one_object_may_have_any_mode_of_one_channel(images: Artefact, save: Callable[..., str], mode: str) -> None:
    mask = Image.fromarray(tiles(0, 1, 1, 0, 0, 1).astype(np.uint8) * (255 if mode == "1" else 1))
    if mode == "P":
        mask.putpalette([255, 255, 255, 10, 20, 30])
    found = Masks(save(cat__b_png=mask.convert(mode)), images).load([0], WHOLE, GRID)
    assert found.classes.tolist() == [[0, 1, 1, 0, 0, 1]]


def test_a_mask_is_resized_and_cropped_like_its_image_without_new_values(images: Artefact, save: Callable[..., str]) -> None:
    """Of the wide image the model sees the middle; the classes on the left and right are cut away."""
    mask = np.zeros((32, 96), np.uint8)
    mask[:, :24], mask[:, 24:40], mask[16:, 56:72], mask[:, 72:] = 200, 3, 4, 100
    folder = save(wide_png=mask)
    cropped = Preprocess((16,), (16, 24), "bicubic", (0, 0, 0), (1, 1, 1), "BGR")
    found = Masks(folder, images).load([2], cropped, GRID)
    assert found.classes.tolist() == [[3, 0, 0, 3, 0, 4]]
    assert found.objects.tolist() == [[1, 0, 0, 1, 0, 1]]


def test_a_patch_has_the_class_of_most_of_its_pixels_and_the_share_of_all_objects(images: Artefact, save: Callable[..., str]) -> None:
    mask = np.zeros((32, 48), np.uint8)
    mask[:6, :16], mask[6:11, :16] = 1, 2  # 96 and 80 of 256 pixels
    found = Masks(save(cat__b_png=mask), images).load([0], WHOLE, GRID)
    assert found.classes[0, 0] == 1 and found.objects[0, 0] == pytest.approx(11 / 16)


def test_names_of_classes_make_255_no_class(images: Artefact, save: Callable[..., str]) -> None:
    folder = save(cat__b_png=tiles(0, 1, 2, 255, 255, 0), dog__a_png=tiles(0, 1, 3, 0, 0, 0))
    assert Masks(folder, images).load([0], WHOLE, GRID).classes.tolist() == [[0, 1, 2, 255, 255, 0]]
    (Path(folder) / "classes.txt").write_text("ground\nroof\nriver\n")
    masks = Masks(folder, images)
    found = masks.load([0], WHOLE, GRID)
    assert masks.names == ("ground", "roof", "river") and masks.name(2) == "river"
    assert found.classes.tolist() == [[0, 1, 2, -1, -1, 0]] and found.objects.tolist() == [[0, 1, 1, 0, 0, 0]]
    said = r"masks/dog/a\.png has the value 3, but classes\.txt names the classes 0 to 2, and 255 stands for no class; correct the mask"
    with pytest.raises(ConfigError, match=said):
        masks.load([1], WHOLE, GRID)


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (np.zeros((32, 48, 3)), r"masks/cat/b\.png has the mode RGB; a mask has one channel .* save it with the mode L or P"),
        (Image.fromarray(np.zeros((32, 48), np.uint16)), r"has the mode I;16; a mask has one channel of at most 8 bits"),
        (tiles(0, 0, 0, 0, 0, 0, side=8), r"cat/b\.png is 24 x 16 pixels, but cat/b\.webp is 48 x 32; make the mask as large"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(images: Artefact, save: Callable[..., str], mask: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"intervene.masks: .*{said}"):
        Masks(save(cat__b_png=mask), images).load([0], WHOLE, GRID)


def test_a_file_that_is_no_png_is_refused(images: Artefact, save: Callable[..., str]) -> None:
    folder = save(cat__b_png=tiles(0, 0, 0, 0, 0, 0))
    Image.new("L", (48, 32)).save(Path(folder) / "cat" / "b.png", "JPEG")
    with pytest.raises(ConfigError, match=r"intervene.masks: .*b\.png cannot be read as PNG \(UnidentifiedImageError\); save it again"):
        Masks(folder, images).load([0], WHOLE, GRID)


def test_folders_that_are_not_those_of_the_images_are_refused(images: Artefact, save: Callable[..., str], tmp_path: Path) -> None:
    said = r"intervene.masks: .*nowhere: no such folder; .* set intervene.masks to a folder of PNG files"
    with pytest.raises(ConfigError, match=said):
        Masks(str(tmp_path / "nowhere"), images)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"intervene.masks: .*empty: there are no files named \*\.png in this folder"):
        Masks(str(tmp_path / "empty"), images)
    said = r"has no mask of any image; that of cat/b\.webp would be cat/b\.webp\.png or cat/b\.png, but there are cow/c\.png$"
    with pytest.raises(ConfigError, match=said):
        Masks(save(cow__c_png=tiles(0, 0, 0, 0, 0, 0)), images)


def test_one_mask_is_not_that_of_two_images(tmp_path: Path, save: Callable[..., str]) -> None:
    (tmp_path / "photos").mkdir()
    for name, colour in (("a.jpg", "red"), ("a.webp", "blue")):
        Image.new("RGB", (48, 32), colour).save(tmp_path / "photos" / name)
    images = make_artefact(tmp_path / "images", "images", make_images, make_params(tmp_path).images, {})
    said = r"a\.jpg and a\.webp share the mask a\.png; name their masks a\.jpg\.png and a\.webp\.png"
    with pytest.raises(ConfigError, match=said):
        Masks(save(a_png=tiles(0, 0, 0, 0, 0, 0)), images)


@pytest.mark.parametrize("text", ["", "ground", "ground\n\nroof", "ground\nroof\nroof", "\n".join(map(str, range(256)))])
def test_lists_of_classes_that_name_none_or_one_twice_are_refused(images: Artefact, save: Callable[..., str], text: str) -> None:
    folder = save(cat__b_png=tiles(0, 0, 0, 0, 0, 0))
    (Path(folder) / "classes.txt").write_text(text)
    with pytest.raises(ConfigError, match=r"intervene.masks: .*classes.txt has \d+ lines, .* 2 to 255 different names, one a line"):
        Masks(folder, images)


def test_drawn_images_have_the_masks_of_their_figures(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"n_images": 9, "size": 48, "seed": 3}))
    params = make_test_params(images={"source": {"kind": "shapes", "path": str(plan)}, "limit": None})
    images = make_artefact(tmp_path / "images", "images", make_images, params.images, {})
    masks = Masks(str(plan), images)
    found = masks.load(range(9), Preprocess((48,), (48, 48), "bicubic", (0, 0, 0), (1, 1, 1)), (48, 48))
    assert masks.names == ("background", *SHAPES) and masks.n_missing == 0
    for number in range(9):
        figure = make_figure(3, number)
        pixels = draw(figure, 48).astype(int)
        differs = (abs(pixels - pixels[0, 0]).max(2) > 0) | (abs(pixels - pixels[-1, -1]).max(2) > 0)
        classes = found.classes[number].view(48, 48).numpy()
        assert set(np.unique(classes)) == {0, 1 + SHAPES.index(figure.shape)}
        assert np.array_equal(classes > 0, draw_mask(figure, 48)) and not (classes > 0)[~differs].any()
        assert found.objects[number].sum() == (classes > 0).sum() > 0.3 * differs.sum()
    plan.write_text(json.dumps({"n_images": 9, "size": 48, "seed": 4}))
    with pytest.raises(ConfigError, match=r"plan.json is not the plan of the images; set it to images.source.path, or to null"):
        Masks(str(plan), images)


def test_sources_follow_the_content_of_masks_and_of_their_names(
    images: Artefact, save: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMMATID_CACHE", str(tmp_path / "cache"))
    folder = save(cat__b_png=tiles(0, 0, 0, 0, 0, 0))
    params = make_params(tmp_path, folder)

    def look() -> str:
        write_sources(params, tmp_path / "sources")
        return (tmp_path / "sources" / "intervene.json").read_text()

    seen = [look()]
    save(cat__b_png=tiles(0, 0, 0, 0, 0, 1))
    seen.append(look())
    (Path(folder) / "classes.txt").write_text("ground\nroof\n")
    seen.append(look())
    assert len(set(seen)) == 3 and look() == seen[2] and "intervene.masks" in json.loads(seen[2])
    (Path(folder) / "notes.md").write_text("not read")
    assert look() == seen[2]
    with pytest.raises(SourceError, match=r"nowhere: no such folder; .* set intervene.masks to a folder of PNG files"):
        write_sources(make_params(tmp_path, str(tmp_path / "nowhere")), tmp_path / "sources")


def test_activation_outside_the_object_is_a_share_of_each_image_on_which_the_latent_fires() -> None:
    acts = torch.tensor([[3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 20.0]])
    objects = torch.tensor([[1.0, 0.5, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.25, 0.0, 0.0, 0.0]])
    found = activation_outside(acts, objects)
    assert found.share.value == pytest.approx((0.5 / 4 + 1) / 2) and found.share.low <= found.share.value <= found.share.high
    assert found.area == pytest.approx((2.5 + 3.75) / 8) and found.n == 2
    silent = activation_outside(torch.zeros(2, 4), objects[:2])
    assert silent.n == 0 and np.isnan(silent.share.value) and np.isnan(silent.area)
