"""VitVision equals, number by number, hand-written hooks on ViT and DeiT, on images that are not square."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeiTConfig, DeiTModel, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ommatid.config.models import VitModel
from ommatid.errors import ModelError
from ommatid.vlm import Hookpoint, VisionModel, load_model
from ommatid.vlm.vit import VitVision
from support.models import SIZES, randomise, save_weights
from support.towers import (
    PARTS,
    by_processor,
    check_bfloat16,
    check_gradients,
    check_hooks,
    check_nothing_left,
    check_planted_patch,
    check_planted_patch_in_artefact,
    check_residual_stream,
    check_splice,
    check_splice_alone,
    check_trust,
    noise,
)

TINY: dict[str, Any] = SIZES | {"image_size": (48, 64), "patch_size": 16}
MODELS: dict[str, Any] = {"vit": lambda: ViTModel(ViTConfig(**TINY)), "deit": lambda: DeiTModel(DeiTConfig(**TINY))}
SPECIAL = {"vit": ("cls",), "deit": ("cls", "distillation")}
PROCESSOR = ViTImageProcessorPil(size={"height": 48, "width": 64})


def load(folder: Path, dtype: Any = "float32") -> VisionModel:
    return load_model(VitModel(kind="vit", path=str(folder)), dtype, "cpu")


@pytest.fixture(scope="module", params=["vit", "deit"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def reference(kind: str) -> Any:
    return randomise(MODELS[kind]())


@pytest.fixture(scope="module")
def folder(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("tiny-vit"), reference, PROCESSOR)


@pytest.fixture(scope="module")
def vision(folder: Path) -> VisionModel:
    model = load(folder)
    assert isinstance(model, VitVision)
    return model


def test_the_checks_at_load_pass(vision: VisionModel) -> None:
    check_trust(vision)


def test_the_hookpoints_are_listed_in_order(vision: VisionModel, kind: str) -> None:
    block = Hookpoint(d_model=32, special=SPECIAL[kind], grid=(3, 4))
    assert vision.hookpoints == {f"vision.blocks.{i}{part}": block for i in range(3) for part in PARTS}
    assert vision.d_embed is None and vision.text_templates == ()


def test_every_hookpoint_equals_a_hand_written_hook(vision: VisionModel, reference: Any) -> None:
    pixels = noise(vision)
    check_hooks(vision, modules_of(reference), lambda: reference(by_processor(PROCESSOR, pixels)), pixels)


def test_blocks_output_the_residual_stream(vision: VisionModel, reference: Any) -> None:
    pixels = noise(vision)
    with torch.no_grad():
        states = reference(by_processor(PROCESSOR, pixels), output_hidden_states=True).hidden_states
    check_residual_stream(vision, states, pixels)


def test_planted_patch_is_found_at_its_row_and_column(vision: VisionModel) -> None:
    check_planted_patch(vision, (3, 4))


def test_planted_patch_goes_through_to_the_artefact(tmp_path: Path, folder: Path, vision: VisionModel) -> None:
    check_planted_patch_in_artefact(tmp_path, vision, {"kind": "vit", "path": str(folder)})


def test_bfloat16_is_close_to_float32(folder: Path) -> None:
    check_bfloat16(lambda dtype: load(folder, dtype))


def test_nothing_runs_after_the_last_hookpoint(folder: Path) -> None:
    vision: Any = load(folder)
    ran = []
    for name in ("vision.blocks.1", "vision.blocks.2.attn"):
        vision._modules[name].register_forward_hook(lambda _m, _i, _o, name=name: ran.append(name))
    pixels = noise(vision)
    vision.capture(pixels, ["vision.blocks.1", "vision.blocks.0"])
    assert ran == ["vision.blocks.1"]
    nothing = vision.capture(pixels, ())
    assert nothing.tokens == {} and nothing.embedding is None and ran == ["vision.blocks.1"]


def modules_of(reference: Any) -> dict[str, Any]:
    modules = {}
    for i, block in enumerate(reference.layers):
        modules |= {f"vision.blocks.{i}.attn": block.attention, f"vision.blocks.{i}.mlp": block.mlp, f"vision.blocks.{i}": block}
    return modules


def test_splices_and_gradients_equal_hand_written_hooks_on_the_class_token(vision: VisionModel, reference: Any) -> None:
    pixels = noise(vision)
    for check in (check_splice, check_gradients):
        check(vision, modules_of(reference), lambda: reference(by_processor(PROCESSOR, pixels)).last_hidden_state[:, 0], pixels)
    check_splice_alone(vision, pixels, "vision.blocks.1")


def test_blocks_before_the_hookpoint_run_once(folder: Path) -> None:
    vision: Any = load(folder)
    ran = []
    for name in ("vision.blocks.0.attn", "vision.blocks.1.attn", "vision.blocks.2.attn"):
        vision._modules[name].register_forward_hook(lambda _m, _i, _o, name=name: ran.append(name[-6]))
    vision.splice(noise(vision), "vision.blocks.1", [lambda x: x] * 3)
    assert "".join(ran) == "01222"
    ran.clear()
    vision.splice(noise(vision), "vision.blocks.1.mlp", [lambda x: x] * 2)
    assert "".join(ran) == "01212"


def test_a_model_without_a_text_tower_embeds_no_text(vision: VisionModel) -> None:
    with pytest.raises(ModelError, match=r"has no text tower; set extract\.namer"):
        vision.embed_text(["a dog"])


def test_scores_that_cannot_be_used_are_refused(vision: VisionModel) -> None:
    pixels = noise(vision)
    for score, message in (
        (lambda y: y, r"score gave \(5, 32\) for outputs \(5, 32\)"),
        (lambda y: y.detach().sum(1), "the score cannot be differentiated"),
    ):
        with pytest.raises(AssertionError, match=message):
            vision.differentiate(pixels, "vision.blocks.1", score)
    with pytest.raises(AssertionError, match=r"\(5, 13, 32\) cannot take the place of|\(5, 12, 32\) cannot take the place of"):
        vision.differentiate(pixels, "vision.blocks.1", lambda y: y.sum(1), lambda x: x[:, 1:])
    with pytest.raises(ModelError, match="no such hookpoint"):
        vision.differentiate(pixels, "vision.blocks.7", lambda y: y.sum(1))
    check_nothing_left(vision)


def test_an_image_size_that_disagrees_with_the_preprocessor_is_refused(reference: Any, tmp_path: Path) -> None:
    save_weights(tmp_path, reference, ViTImageProcessorPil(size={"height": 64, "width": 48}))
    with pytest.raises(ModelError, match=r"crops to 64 x 48, but config\.json says image_size 48 x 64"):
        load(tmp_path)
