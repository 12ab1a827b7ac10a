"""DinoVision equals, number by number, hand-written hooks on DINOv2, with and without registers, and DINOv3, after the layer scale."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from ommatid.config.models import DinoModel
from ommatid.errors import ModelError
from ommatid.vlm import Hookpoint, VisionModel, load_model
from ommatid.vlm.dino import DinoVision
from support.models import randomise
from support.towers import (
    PARTS,
    by_hand,
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

TINY: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 16}
MODELS: dict[str, Any] = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(image_size=80, mlp_ratio=2, **TINY)),
    "swiglu": lambda: Dinov2Model(Dinov2Config(image_size=80, mlp_ratio=2, use_swiglu_ffn=True, **TINY)),
    "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(image_size=80, mlp_ratio=2, num_register_tokens=3, **TINY)),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(image_size=80, intermediate_size=64, num_register_tokens=4, **TINY)),
}
N_REGISTERS = {"dinov2": 0, "swiglu": 0, "registers": 3, "dinov3": 4}
# Images are smaller than what config.json calls image_size, as with facebook/dinov2-base: 224 and 518.
PROCESSOR = BitImageProcessorPil(size={"shortest_edge": 70}, crop_size={"height": 48, "width": 64})
DINOV3_PROCESSOR = {
    "image_processor_type": "DINOv3ViTImageProcessorFast",
    "size": {"height": 48, "width": 64},
    "do_center_crop": None,
    "crop_size": None,
    "image_mean": [0.43, 0.411, 0.296],
}


def save(model: Any, folder: Path, kind: str) -> Path:
    model.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    if kind == "dinov3":
        (folder / "preprocessor_config.json").write_text(json.dumps(DINOV3_PROCESSOR))
    return folder


def load(folder: Path, dtype: Any = "float32") -> VisionModel:
    return load_model(DinoModel(kind="dino", path=str(folder)), dtype, "cpu")


def blocks_of(model: Any) -> Any:
    return model.model.layer if isinstance(model, DINOv3ViTModel) else model.encoder.layer


@pytest.fixture(scope="module", params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def reference(kind: str) -> Any:
    return randomise(MODELS[kind]())


@pytest.fixture(scope="module")
def folder(reference: Any, kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(reference, tmp_path_factory.mktemp("tiny-dino"), kind)


@pytest.fixture(scope="module")
def vision(folder: Path) -> VisionModel:
    model = load(folder)
    assert isinstance(model, DinoVision)
    return model


def test_the_checks_at_load_pass(vision: VisionModel) -> None:
    check_trust(vision)


def test_the_hookpoints_are_listed_in_order(vision: VisionModel, kind: str) -> None:
    block = Hookpoint(d_model=32, special=("cls", *("register",) * N_REGISTERS[kind]), grid=(3, 4))
    assert vision.hookpoints == {f"vision.blocks.{i}{part}": block for i in range(3) for part in PARTS}
    assert vision.d_embed is None


def modules_of(reference: Any) -> dict[str, Any]:
    modules = {}
    for i, block in enumerate(blocks_of(reference)):
        name = f"vision.blocks.{i}"
        modules |= {f"{name}.attn": block.layer_scale1, f"{name}.mlp": block.layer_scale2, name: block}
    return modules


def test_every_hookpoint_equals_a_hand_written_hook(vision: VisionModel, reference: Any) -> None:
    pixels = noise(vision)
    check_hooks(vision, modules_of(reference), lambda: reference(by_hand(vision, pixels)), pixels)


def test_splices_and_gradients_equal_hand_written_hooks_on_the_class_token(vision: VisionModel, reference: Any) -> None:
    pixels = noise(vision)
    for check in (check_splice, check_gradients):
        check(vision, modules_of(reference), lambda: reference(by_hand(vision, pixels)).last_hidden_state[:, 0], pixels)
    check_splice_alone(vision, pixels, "vision.blocks.1")


def test_blocks_output_the_residual_stream(vision: VisionModel, reference: Any) -> None:
    pixels = noise(vision)
    with torch.no_grad():
        states = reference(by_hand(vision, pixels), output_hidden_states=True).hidden_states
    check_residual_stream(vision, states, pixels)


def test_special_tokens_come_first_and_in_order(vision: VisionModel, reference: Any, kind: str) -> None:
    """Before the first block, special tokens do not depend on the image, and only the class token has a position embedding."""
    pixels = noise(vision)
    attn, mlp, block = vision.capture(pixels, [f"vision.blocks.0{part}" for part in PARTS]).tokens.values()
    before = block - attn - mlp
    learnt = reference.embeddings
    position = learnt.position_embeddings[:, :1] if kind != "dinov3" else 0
    special = torch.cat([learnt.cls_token + position, *([learnt.register_tokens] if N_REGISTERS[kind] else [])], dim=1)
    torch.testing.assert_close(before[:, : 1 + N_REGISTERS[kind]], special.expand(len(pixels), -1, -1), atol=1e-5, rtol=1e-5)


def test_planted_patch_is_found_at_its_row_and_column(vision: VisionModel) -> None:
    check_planted_patch(vision, (3, 4))


def test_planted_patch_goes_through_to_the_artefact(tmp_path: Path, folder: Path, vision: VisionModel) -> None:
    check_planted_patch_in_artefact(tmp_path, vision, {"kind": "dino", "path": str(folder)})


def test_bfloat16_is_close_to_float32(folder: Path) -> None:
    check_bfloat16(lambda dtype: load(folder, dtype))


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    ViTModel(ViTConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a vit model; kind dino takes model_type dinov2 or dinov2_with_registers or dinov3_vit"):
        load(tmp_path)
