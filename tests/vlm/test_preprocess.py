"""Preprocessing equals that of transformers, its box says which part of the image the square shows, and a manifest can hold it."""

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ommatid.errors import ModelError
from ommatid.vlm.precision import normalise
from ommatid.vlm.preprocess import MAX_PIXELS, Preprocess
from ommatid.vlm.processor import load_preprocess
from support.families import FAMILIES, make_processor

SQUARE = Preprocess((56,), (48, 48), "bicubic", mean=(127.0,) * 3, std=(128.0,) * 3)


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(32, 32), (100, 57), (57, 101), (200, 31), (48, 48), (640, 479)])
def test_preprocessing_equals_that_of_transformers(size: tuple[int, int]) -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 48, "width": 48})
    expected = processor(noise(*size), return_tensors="pt", do_normalize=False, do_rescale=False)["pixel_values"][0]
    actual = torch.from_numpy(SQUARE(noise(*size))).permute(2, 0, 1)
    assert torch.equal(actual, torch.from_numpy(np.asarray(expected)))


ODD = list(itertools.product((17, 33, 57, 101, 223, 640), (19, 57, 100, 301, 479)))


@pytest.mark.parametrize("processor", [FAMILIES[name][2:] for name in ("clip", "convnext", "poolformer")], ids=lambda case: case[0])
def test_every_pixel_of_unusual_shapes_equals_the_processors(tmp_path: Path, processor: tuple[str, Any]) -> None:
    own = make_processor(*processor)
    own.save_pretrained(tmp_path)
    preprocess = load_preprocess(tmp_path, "tiny", "key")
    for size in ODD:
        expected = own(noise(*size), return_tensors="np", do_normalize=False, do_rescale=False)["pixel_values"][0]
        assert np.array_equal(preprocess(noise(*size)), expected.transpose(1, 2, 0)), size


@pytest.mark.parametrize("family", ["beit", "deit", "dinov2", "efficientnet", "levit", "mobilevit", "pvt", "siglip", "vit"])
def test_families_equal_their_processors(tmp_path: Path, family: str) -> None:
    processor = make_processor(*FAMILIES[family][2:])
    processor.save_pretrained(tmp_path)
    preprocess = load_preprocess(tmp_path, "tiny", "key")
    for size in ((32, 32), (100, 57), (57, 101), (640, 479)):
        expected = torch.from_numpy(np.asarray(processor(noise(*size), return_tensors="np")["pixel_values"], np.float32))
        actual = normalise(torch.from_numpy(preprocess(noise(*size)))[None], preprocess, "cpu")
        levels = (actual - expected).abs() * torch.tensor(preprocess.std)[:, None, None]
        assert levels.max() < 1e-3, (family, size)


@pytest.mark.parametrize(
    ("processor", "settings"),
    [
        ("ConvNext", {"size": {"shortest_edge": 384}}),
        ("ConvNext", {"size": {"shortest_edge": 48}, "crop_pct": 0.95}),
        ("EfficientNet", {"size": {"height": 48, "width": 48}, "include_top": False}),
        ("PoolFormer", {"size": {"height": 48, "width": 40}, "crop_size": {"height": 32, "width": 32}}),
        ("ViT", {"size": {"height": 48, "width": 48}, "do_rescale": False, "image_mean": 10.0, "image_std": 20.0}),
        ("ViT", {"size": {"height": 48, "width": 48}, "do_normalize": False}),
        ("ViT", {"size": {"height": 48, "width": 48}, "resample": 0}),
    ],
)
def test_settings_have_the_same_meaning_as_in_the_processor(tmp_path: Path, processor: str, settings: dict[str, Any]) -> None:
    make_processor(processor, settings).save_pretrained(tmp_path)
    load_preprocess(tmp_path, "tiny", "key")  # it compares


def test_a_processor_that_does_something_else_is_refused(tmp_path: Path) -> None:
    class Sharpening(ViTImageProcessorPil):
        def resize(self, image: np.ndarray, *args: Any, **kwargs: Any) -> np.ndarray:
            return np.clip(super().resize(image, *args, **kwargs).astype(np.int64) + 2, 0, 255).astype(np.uint8)

    make_processor("ViT", {"size": {"height": 48, "width": 48}}).save_pretrained(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoImageProcessor, "from_pretrained", lambda *args, **kwargs: Sharpening(size={"height": 48, "width": 48}))
        with pytest.raises(ModelError, match=r"tiny: its image processor \(Sharpening\) does more .* by up to 2 levels of 255"):
            load_preprocess(tmp_path, "tiny", "key")


@pytest.mark.parametrize("size", [(32, 32), (100, 57), (57, 101), (640, 479)])
def test_dinov3_equals_an_antialiased_resize_of_the_numbers(tmp_path: Path, size: tuple[int, int]) -> None:
    """The processor of DINOv3, which needs torchvision, resizes tensors with this function of torch."""
    settings = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 48, "width": 64}, "do_center_crop": None}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    preprocess = load_preprocess(tmp_path, "tiny", "key")
    assert preprocess.mean == pytest.approx((255 * 0.485, 255 * 0.456, 255 * 0.406))
    image = torch.from_numpy(np.array(noise(*size))).permute(2, 0, 1)[None].float()
    expected = torch.nn.functional.interpolate(image, (48, 64), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    difference = (torch.from_numpy(preprocess(noise(*size))).float() - expected).abs()
    assert difference.max() <= 1.01 and difference.mean() < 0.4


def test_normalise_equals_transformers() -> None:
    processor = CLIPImageProcessorPil(size={"height": 48, "width": 48}, do_center_crop=False)
    mean, std = (tuple(255 * value for value in values) for values in (processor.image_mean, processor.image_std))
    preprocess = Preprocess((48, 48), (48, 48), "bicubic", mean, std)
    image = noise(100, 57)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    actual = normalise(torch.from_numpy(preprocess(image))[None], preprocess, "cpu")
    torch.testing.assert_close(actual, expected.float(), atol=1e-5, rtol=0)
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_box_of_a_wide_image_is_its_middle() -> None:
    assert Preprocess((64,), (64, 64), "bicubic", (0.0,) * 3, (1.0,) * 3).box(200, 100) == (50.0, 0.0, 150.0, 100.0)


@given(width=st.integers(1, 3000), height=st.integers(1, 3000))
def test_box_lies_inside_the_image(width: int, height: int) -> None:
    left, top, right, bottom = SQUARE.box(width, height)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_only_the_box_of_a_panorama_is_resampled() -> None:
    image = noise(30_000, 20)
    width, height = 84_000, 56  # resized whole
    assert width * height > MAX_PIXELS
    left = (width - 48) // 2
    whole = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC).crop((left, 4, left + 48, 52))).astype(int)
    difference = np.abs(SQUARE(image) - whole)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-2


def test_a_panorama_needs_little_memory() -> None:
    assert SQUARE(Image.new("RGB", (60_000, 1), "red")).shape == (48, 48, 3)


def test_preprocessing_survives_json_and_pickle() -> None:
    assert Preprocess(**json.loads(json.dumps(SQUARE.as_json()))) == SQUARE
    assert pickle.loads(pickle.dumps(SQUARE)) == SQUARE
