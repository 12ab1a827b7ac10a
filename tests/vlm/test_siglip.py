"""SiglipVision equals, number by number, hand-written hooks and the functions of transformers, on a tiny random SigLIP."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Siglip2Tokenizer, SiglipConfig
from transformers import SiglipModel as Reference
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from ommatid.config.models import SiglipModel
from ommatid.errors import ModelError
from ommatid.vlm import Hookpoint, VisionModel, load_model
from ommatid.vlm.siglip import SiglipVision
from support.models import SIZES, randomise, save_weights
from support.towers import (
    PARTS,
    by_processor,
    check_bfloat16,
    check_gradients,
    check_hooks,
    check_planted_patch,
    check_planted_patch_in_artefact,
    check_residual_stream,
    check_splice,
    check_splice_alone,
    check_trust,
    noise,
)

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ▁"
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
VOCABULARY = {token: i for i, token in enumerate([*SPECIAL, *LETTERS])}
PROCESSOR = SiglipImageProcessorPil(size={"height": 48, "width": 48})
LENGTH = 16


def load(folder: Path, dtype: Any = "float32") -> VisionModel:
    return load_model(SiglipModel(kind="siglip", path=str(folder)), dtype, "cpu")


@pytest.fixture(scope="module")
def reference() -> Any:
    text = SIZES | {"vocab_size": len(VOCABULARY), "max_position_embeddings": LENGTH, "projection_size": 32}
    return randomise(Reference(SiglipConfig(text_config=text, vision_config=SIZES | {"image_size": 48, "patch_size": 16})))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return Siglip2Tokenizer(vocab=VOCABULARY, merges=[])


@pytest.fixture(scope="module")
def folder(reference: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_weights(tmp_path_factory.mktemp("tiny-siglip"), reference, PROCESSOR)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vision(folder: Path) -> VisionModel:
    model = load(folder)
    assert isinstance(model, SiglipVision)
    return model


def block_modules(reference: Any) -> dict[str, torch.nn.Module]:
    modules = {}
    for i, block in enumerate(reference.vision_model.encoder.layers):
        modules |= {f"vision.blocks.{i}.attn": block.self_attn, f"vision.blocks.{i}.mlp": block.mlp, f"vision.blocks.{i}": block}
    return modules


def test_the_checks_at_load_pass(vision: VisionModel) -> None:
    check_trust(vision)


def test_the_hookpoints_are_listed_in_order(vision: VisionModel) -> None:
    block = Hookpoint(d_model=32, special=(), grid=(3, 3))
    assert vision.hookpoints == {
        **{f"vision.blocks.{i}{part}": block for i in range(3) for part in PARTS},
        "vision.head": Hookpoint(d_model=32, special=("pooled",), grid=None),
    }


def test_every_hookpoint_equals_a_hand_written_hook(vision: VisionModel, reference: Any) -> None:
    pixels = noise(vision)
    check_hooks(vision, block_modules(reference), lambda: reference.vision_model(by_processor(PROCESSOR, pixels)), pixels)


def test_splices_and_gradients_equal_hand_written_hooks(vision: VisionModel, reference: Any) -> None:
    pixels = noise(vision)
    inputs = by_processor(PROCESSOR, pixels)
    modules = {**block_modules(reference), "vision.head": reference.vision_model.head}
    for check in (check_splice, check_gradients):
        check(vision, modules, lambda: reference.get_image_features(inputs).pooler_output, pixels)
    check_splice_alone(vision, pixels, "vision.blocks.1")
    assert vision.logit_scale == pytest.approx(reference.logit_scale.exp().item())


def test_blocks_output_the_residual_stream(vision: VisionModel, reference: Any) -> None:
    pixels = noise(vision)
    with torch.no_grad():
        states = reference.vision_model(by_processor(PROCESSOR, pixels), output_hidden_states=True).hidden_states
    check_residual_stream(vision, states, pixels)


def test_embedding_and_head_equal_transformers(vision: VisionModel, reference: Any) -> None:
    pixels = noise(vision)
    with torch.no_grad():
        expected = reference.get_image_features(by_processor(PROCESSOR, pixels)).pooler_output
    captured = vision.capture(pixels, ["vision.head"])
    assert captured.embedding is not None and vision.d_embed == 32
    torch.testing.assert_close(captured.embedding, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(captured.tokens["vision.head"], expected[:, None], atol=1e-5, rtol=1e-5)


def test_text_equals_transformers_padded_to_the_full_length(vision: VisionModel, reference: Any) -> None:
    texts = ["a dog", "Cat", "a very long text that does not fit", ""]
    rows = [[VOCABULARY["▁" if letter == " " else letter] for letter in text.lower()][:LENGTH] for text in texts]
    by_hand = torch.tensor([[0] * (LENGTH - len(row)) + row for row in rows])  # this tokenizer pads at the left
    with torch.no_grad():
        expected = reference.get_text_features(by_hand).pooler_output
    torch.testing.assert_close(vision.embed_text(texts), expected, atol=1e-5, rtol=1e-5)
    assert vision.embed_text([]).shape == (0, 32)


def test_tokenizer_of_the_first_siglip_needs_no_sentencepiece(vision: VisionModel, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "SiglipTokenizer", "padding_side": "left"}))
    texts = ["a dog", "Cat"]
    assert torch.equal(load(tmp_path).embed_text(texts), vision.embed_text(texts))


def test_planted_patch_is_found_at_its_row_and_column(vision: VisionModel) -> None:
    check_planted_patch(vision, (3, 3))


def test_planted_patch_goes_through_to_the_artefact(tmp_path: Path, folder: Path, vision: VisionModel) -> None:
    check_planted_patch_in_artefact(tmp_path, vision, {"kind": "siglip", "path": str(folder)})


def test_bfloat16_is_close_to_float32(folder: Path) -> None:
    check_bfloat16(lambda dtype: load(folder, dtype))


def test_a_model_without_a_pooling_head_is_refused(reference: Any, tokenizer: Any, tmp_path: Path) -> None:
    save_weights(tmp_path, reference, PROCESSOR)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["vision_use_head"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="has no pooling head"):
        load(tmp_path)
