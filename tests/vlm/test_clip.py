"""ClipVision gives, number by number, what a hand-written hook and transformers' own functions give, on a tiny random CLIP."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ommatid.config import ClipModel
from ommatid.errors import ModelError
from ommatid.vlm import Hookpoint, check_hookpoint, load_model
from ommatid.vlm.clip import ClipVision


@pytest.fixture(scope="module")
def vision(tiny_clip: Path) -> ClipVision:
    model = load_model(ClipModel(kind="clip", path=str(tiny_clip)), "float32", "cpu")
    assert isinstance(model, ClipVision)
    return model


@pytest.fixture(scope="module")
def reference(tiny_clip: Path) -> CLIPModel:
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


def test_hookpoints(vision: ClipVision) -> None:
    block = Hookpoint(d_model=32, special=("cls",), grid=(3, 3))
    assert list(vision.hookpoints)[:3] == ["vision.blocks.0.attn", "vision.blocks.0.mlp", "vision.blocks.0"]
    assert vision.hookpoints == {
        **{f"vision.blocks.{i}{part}": block for i in range(3) for part in (".attn", ".mlp", "")},
        "vision.projection": Hookpoint(d_model=24, special=("cls",), grid=None),
    }


@pytest.mark.parametrize("block", [0, 1, 2])
def test_block_equals_a_hand_written_hook(
    vision: ClipVision, reference: CLIPModel, pixels: torch.Tensor, inputs: torch.Tensor, block: int
) -> None:
    seen = []
    handle = reference.vision_model.encoder.layers[block].register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        hidden = reference.vision_model(inputs, output_hidden_states=True).hidden_states[block + 1]
    handle.remove()
    name = f"vision.blocks.{block}"
    tokens = vision.capture(pixels, [name]).tokens[name]
    torch.testing.assert_close(tokens, seen[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens, hidden, atol=1e-5, rtol=1e-5)


def test_embedding_equals_transformers(vision: ClipVision, reference: CLIPModel, pixels: torch.Tensor, inputs: torch.Tensor) -> None:
    with torch.no_grad():
        expected = reference.get_image_features(inputs).pooler_output
    captured = vision.capture(pixels, ["vision.projection"])
    torch.testing.assert_close(captured.embedding, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(captured.tokens["vision.projection"], expected[:, None], atol=1e-5, rtol=1e-5)


def test_text_equals_transformers_one_at_a_time(vision: ClipVision, reference: CLIPModel, tiny_clip: Path) -> None:
    texts = ["a photo of a dog", "cat", "a very long text that does not fit into the tokens", ""]
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip)
    tokens = [tokenizer([text], truncation=True, max_length=16, return_tensors="pt") for text in texts]
    with torch.no_grad():
        expected = torch.cat([reference.get_text_features(**one).pooler_output for one in tokens])
    torch.testing.assert_close(vision.embed_text(texts), expected, atol=1e-5, rtol=1e-5)
    assert vision.embed_text([]).shape == (0, 24)


def test_changed_patch_is_found_at_its_row_and_column(vision: ClipVision) -> None:
    dark = torch.zeros(9, 48, 48, 3, dtype=torch.uint8)
    bright = dark.clone()
    for i in range(9):
        row, col = divmod(i, 3)
        bright[i, 16 * row : 16 * row + 16, 16 * col : 16 * col + 16] = 255
    before, after = (vision.capture(pixels, ["vision.blocks.0"]).tokens["vision.blocks.0"] for pixels in (dark, bright))
    change = (after - before).norm(dim=-1)
    assert change.shape == (9, 1 + 9)
    assert (change.argmax(1) - 1).tolist() == list(range(9))


def test_bfloat16_is_close(tiny_clip: Path, vision: ClipVision, pixels: torch.Tensor) -> None:
    half = load_model(ClipModel(kind="clip", path=str(tiny_clip)), "bfloat16", "cpu")
    exact, rough = (model.capture(pixels, ["vision.blocks.2"]).tokens["vision.blocks.2"] for model in (vision, half))
    assert 0 < (rough - exact).norm() / exact.norm() < 0.02


def test_no_hook_is_left_behind(vision: ClipVision, pixels: torch.Tensor) -> None:
    vision.capture(pixels, ["vision.blocks.1"])
    assert not vision._model.vision_model.encoder.layers[1]._forward_hooks


def test_unknown_hookpoint_lists_the_nearest_first(vision: ClipVision, pixels: torch.Tensor) -> None:
    with pytest.raises(ModelError, match=r"vision\.blocks\.1, .*vision\.projection") as caught:
        vision.capture(pixels, ["vision.blocks.0", "vision.block.1"])
    assert str(caught.value).partition("one of: ")[2].startswith("vision.blocks.1,")
    with pytest.raises(ModelError, match=r"hookpoint 'x'"):
        check_hookpoint(vision, "x")
