"""ClipVision equals, number by number, a hand-written hook and the functions of transformers, on a tiny random CLIP."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ommatid.config.models import ClipModel
from ommatid.errors import ModelError
from ommatid.vlm import Hookpoint, check_hookpoint, load_model
from ommatid.vlm.clip import ClipVision
from support.towers import (
    check_bfloat16,
    check_gradients,
    check_hooks,
    check_planted_patch,
    check_planted_patch_in_artefact,
    check_reading,
    check_residual_stream,
    check_splice,
    check_splice_alone,
    check_trust,
)


@pytest.fixture(scope="module")
def vision(tiny_clip: Path) -> ClipVision:
    model = load_model(ClipModel(kind="clip", path=str(tiny_clip)), "float32", "cpu")
    assert isinstance(model, ClipVision)
    return model


@pytest.fixture(scope="module")
def reference(tiny_clip: Path) -> Any:
    return CLIPModel.from_pretrained(tiny_clip).eval()


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)) for _ in range(5)]


@pytest.fixture(scope="module")
def pixels(vision: ClipVision, images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([vision.preprocess(image) for image in images]))


@pytest.fixture(scope="module")
def inputs(vision: ClipVision, tiny_clip: Path, pixels: torch.Tensor) -> torch.Tensor:
    processor = CLIPImageProcessorPil.from_pretrained(tiny_clip)
    squares = [Image.fromarray(square.numpy()) for square in pixels]
    return processor(squares, return_tensors="pt", do_resize=False)["pixel_values"].float()


def block_modules(tower: Any) -> dict[str, torch.nn.Module]:
    modules = {}
    for i, block in enumerate(tower.encoder.layers):
        modules |= {f"vision.blocks.{i}.attn": block.self_attn, f"vision.blocks.{i}.mlp": block.mlp, f"vision.blocks.{i}": block}
    return modules


def test_the_checks_at_load_pass(vision: ClipVision) -> None:
    check_trust(vision)


def test_the_hookpoints_are_listed_in_order(vision: ClipVision) -> None:
    block = Hookpoint(d_model=32, special=("cls",), grid=(3, 3))
    assert list(vision.hookpoints)[:3] == ["vision.blocks.0.attn", "vision.blocks.0.mlp", "vision.blocks.0"]
    assert vision.hookpoints == {
        **{f"vision.blocks.{i}{part}": block for i in range(3) for part in (".attn", ".mlp", "")},
        "vision.projection": Hookpoint(d_model=24, special=("cls",), grid=None),
    }


def test_every_hookpoint_equals_a_hand_written_hook(
    vision: ClipVision, tiny_clip: Path, pixels: torch.Tensor, inputs: torch.Tensor
) -> None:
    tower: Any = CLIPModel.from_pretrained(tiny_clip).eval().vision_model
    check_hooks(vision, block_modules(tower), lambda: tower(inputs), pixels)


def test_splices_and_gradients_equal_hand_written_hooks(
    vision: ClipVision, reference: Any, pixels: torch.Tensor, inputs: torch.Tensor
) -> None:
    modules = {**block_modules(reference.vision_model), "vision.projection": reference.visual_projection}
    for check in (check_splice, check_gradients):
        check(vision, modules, lambda: reference.get_image_features(inputs).pooler_output, pixels)
    check_splice_alone(vision, pixels, "vision.blocks.1")
    check_reading(vision, pixels, "vision.blocks.0", "vision.blocks.1")
    check_reading(vision, pixels, "vision.blocks.1.mlp", "vision.projection")


@pytest.mark.parametrize("hookpoint", ["vision.blocks.0", "vision.blocks.1.mlp", "vision.projection"])
def test_splicing_the_same_values_in_bfloat16_changes_nothing(tiny_clip: Path, pixels: torch.Tensor, hookpoint: str) -> None:
    model = load_model(ClipModel(kind="clip", path=str(tiny_clip)), "bfloat16", "cpu")
    plain = model.capture(pixels, ()).embedding
    (same,) = model.splice(pixels, hookpoint, [lambda x: x.float()])
    assert plain is not None and torch.equal(same, plain)


def test_unusable_replacements_are_refused(vision: ClipVision, pixels: torch.Tensor) -> None:
    with pytest.raises(ModelError, match=r"hookpoint 'vision\.blocks\.7'"):
        vision.splice(pixels, "vision.blocks.7", [lambda x: x])
    with pytest.raises(AssertionError, match=r"\(5, 9, 32\) cannot take the place of \(5, 10, 32\)"):
        vision.splice(pixels, "vision.blocks.1", [lambda x: x[:, 1:]])
    assert not vision._model.vision_model.encoder.layers[1]._forward_hooks


def test_logit_scale_is_the_models(vision: ClipVision, reference: Any, inputs: torch.Tensor) -> None:
    texts = torch.tensor([[52, 1, 53], [52, 2, 53]])
    with torch.no_grad():
        logits = reference(input_ids=texts, pixel_values=inputs).logits_per_image
        embedded = [reference.get_image_features(inputs).pooler_output, reference.get_text_features(texts).pooler_output]
    images, words = (torch.nn.functional.normalize(x, dim=1) for x in embedded)
    assert vision.logit_scale is not None
    torch.testing.assert_close(vision.logit_scale * images @ words.T, logits, atol=1e-5, rtol=1e-5)


def test_blocks_output_the_residual_stream(vision: ClipVision, reference: Any, pixels: torch.Tensor, inputs: torch.Tensor) -> None:
    with torch.no_grad():
        states = reference.vision_model(inputs, output_hidden_states=True).hidden_states
    check_residual_stream(vision, states, pixels)


def test_embedding_equals_transformers(vision: ClipVision, reference: Any, pixels: torch.Tensor, inputs: torch.Tensor) -> None:
    with torch.no_grad():
        expected = reference.get_image_features(inputs).pooler_output
    captured = vision.capture(pixels, ["vision.projection"])
    torch.testing.assert_close(captured.embedding, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(captured.tokens["vision.projection"], expected[:, None], atol=1e-5, rtol=1e-5)


def test_text_equals_transformers_one_at_a_time(vision: ClipVision, reference: Any, tiny_clip: Path) -> None:
    texts = ["a photo of a dog", "cat", "a very long text that does not fit into the tokens", ""]
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip)
    tokens = [tokenizer([text], truncation=True, max_length=16, return_tensors="pt") for text in texts]
    with torch.no_grad():
        expected = torch.cat([reference.get_text_features(**one).pooler_output for one in tokens])
    torch.testing.assert_close(vision.embed_text(texts), expected, atol=1e-5, rtol=1e-5)
    assert vision.embed_text([]).shape == (0, 24)


def test_planted_patch_is_found_at_its_row_and_column(vision: ClipVision) -> None:
    check_planted_patch(vision, (3, 3))


def test_planted_patch_goes_through_to_the_artefact(tmp_path: Path, tiny_clip: Path, vision: ClipVision) -> None:
    check_planted_patch_in_artefact(tmp_path, vision, {"kind": "clip", "path": str(tiny_clip)})


def test_bfloat16_is_close_to_float32(tiny_clip: Path) -> None:
    check_bfloat16(lambda dtype: load_model(ClipModel(kind="clip", path=str(tiny_clip)), dtype, "cpu"))


def test_no_hook_is_left_behind(vision: ClipVision, pixels: torch.Tensor) -> None:
    vision.capture(pixels, ["vision.blocks.1"])
    assert not vision._model.vision_model.encoder.layers[1]._forward_hooks


def test_unknown_hookpoint_lists_the_nearest_first(vision: ClipVision, pixels: torch.Tensor) -> None:
    with pytest.raises(ModelError, match=r"vision\.blocks\.1, .*vision\.projection") as caught:
        vision.capture(pixels, ["vision.blocks.0", "vision.block.1"])
    assert str(caught.value).partition("one or more of: ")[2].startswith("vision.blocks.1,")
    with pytest.raises(ModelError, match=r"hookpoint 'x'"):
        check_hookpoint(vision, "x")
