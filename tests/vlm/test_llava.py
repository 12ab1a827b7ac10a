"""LlavaVision equals, number by number, hand-written hooks on the LLaVA of transformers, and reads no more than the tower."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from ommatid.config.models import LlavaModel
from ommatid.errors import ModelError
from ommatid.vlm import Hookpoint, load_model
from ommatid.vlm.llava import LlavaVision
from support.models import plant, save_llava, squares
from support.towers import (
    PARTS,
    by_processor,
    check_bfloat16,
    check_gradients,
    check_planted_patch_in_artefact,
    check_residual_stream,
    check_splice,
    check_splice_alone,
    check_trust,
)

EVERY = [f"vision.blocks.{i}{suffix}" for i in range(3) for suffix in (".attn", ".mlp", "")]


def load(folder: Path, dtype: str = "float32") -> LlavaVision:
    model = load_model(LlavaModel(kind="llava", path=str(folder)), dtype, "cpu")  # pyright: ignore[reportArgumentType]
    assert isinstance(model, LlavaVision)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def vision(folder: Path) -> LlavaVision:
    return load(folder)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)) for _ in range(3)]


def pixels_of(vision: LlavaVision, images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([vision.preprocess(image) for image in images]))


def by_hand(full: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what forward hooks on the full model record while the tower runs."""
    seen, handles = {}, []
    for i, block in enumerate(full.model.vision_tower.encoder.layers):
        for suffix, module in ((".attn", block.self_attn), (".mlp", block.mlp), ("", block)):

            def keep(_module: object, _inputs: object, output: torch.Tensor, name: str = f"vision.blocks.{i}{suffix}") -> None:
                seen[name] = output[0] if isinstance(output, tuple) else output

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        full.model.vision_tower(x)
    for handle in handles:
        handle.remove()
    return seen


def test_the_checks_at_load_pass(vision: LlavaVision) -> None:
    check_trust(vision)


def test_the_hookpoints_are_listed_in_order(vision: LlavaVision) -> None:
    block = Hookpoint(d_model=32, special=("cls",), grid=(3, 3))
    assert list(vision.hookpoints) == [*EVERY, "vision.projection"]
    assert {vision.hookpoints[name] for name in EVERY} == {block}
    assert vision.hookpoints["vision.projection"] == Hookpoint(d_model=40, special=(), grid=(3, 3))
    assert vision.d_embed is None and vision.text_templates == ()


def test_every_hookpoint_equals_hand_written_hooks(folder: Path, vision: LlavaVision, images: list[Image.Image]) -> None:
    full: Any = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    pixels = pixels_of(vision, images)
    x = CLIPImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"].float()
    expected = by_hand(full, x)
    with torch.no_grad():
        projected = torch.stack(list(full.get_image_features(x).pooler_output))
    captured = vision.capture(pixels, [*EVERY, "vision.projection"])
    assert captured.embedding is None and set(captured.tokens) == {*EVERY, "vision.projection"}
    for name in EVERY:
        torch.testing.assert_close(captured.tokens[name], expected[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(captured.tokens["vision.projection"], projected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "special"),
    [
        ({"vision_feature_select_strategy": "full"}, ("cls",)),
        ({"vision_feature_layer": -1}, ()),
        ({"vision_feature_layer": 1}, ()),
        ({"vision_feature_layer": [0, -2]}, ()),
        ({"siglip": True, "vision_feature_select_strategy": "full"}, ()),
    ],
)
def test_projection_takes_the_layers_and_tokens_of_the_config(tmp_path: Path, images: list, changes: dict, special: tuple) -> None:
    vision = load(save_llava(tmp_path, **changes))
    full: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    pixels = pixels_of(vision, images)
    x = CLIPImageProcessorPil.from_pretrained(tmp_path)(squares(pixels), return_tensors="pt")["pixel_values"].float()
    with torch.no_grad():
        projected = torch.stack(list(full.get_image_features(x).pooler_output))
    assert vision.hookpoints["vision.projection"].special == special
    torch.testing.assert_close(vision.capture(pixels, ["vision.projection"]).tokens["vision.projection"], projected, atol=1e-5, rtol=1e-5)


def test_next_takes_the_base_view(tmp_path: Path, images: list[Image.Image]) -> None:
    vision = load(save_llava(tmp_path, next_=True))
    assert vision.preprocess.resize == vision.preprocess.crop == (48, 48)  # stretched whole, nothing cut off
    full: Any = LlavaNextForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = LlavaNextImageProcessorPil.from_pretrained(tmp_path)(images, return_tensors="pt")
    base = batch["pixel_values"][:, 0].float()
    expected = by_hand(full, base)
    captured = vision.capture(pixels_of(vision, images), [*EVERY, "vision.projection"]).tokens
    for name in EVERY:
        torch.testing.assert_close(captured[name], expected[name], atol=1e-4, rtol=1e-4)
    # the full model puts the tokens of the base view before those of the tiles
    with torch.no_grad():
        features = full.get_image_features(batch["pixel_values"].float(), batch["image_sizes"]).pooler_output
    torch.testing.assert_close(captured["vision.projection"], torch.stack([one[:9] for one in features]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("hookpoint", ["vision.blocks.0", "vision.blocks.0.mlp", "vision.blocks.2", "vision.projection"])
def test_bright_patch_is_found_at_its_row_and_column(vision: LlavaVision, hookpoint: str) -> None:
    places = [(0, 1), (1, 2), (2, 0)]
    before, after = (vision.capture(pixels, [hookpoint]).tokens[hookpoint] for pixels in plant(48, 16, places))
    first = len(vision.hookpoints[hookpoint].special)
    change = (after - before)[:, first:].norm(dim=-1)
    assert [divmod(int(i), 3) for i in change.argmax(1)] == places


def test_only_the_tower_and_the_projector_are_read(tmp_path: Path, images: list[Image.Image], vision: LlavaVision) -> None:
    folder = save_llava(tmp_path, shards=True)
    shard_of = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in shard_of.items() if not name.startswith("language_model")}
    others = set(shard_of.values()) - needed
    assert others
    for file in others:
        (folder / file).unlink()
    pixels = pixels_of(vision, images)
    same = load(folder).capture(pixels, ["vision.blocks.2"]).tokens["vision.blocks.2"]
    assert torch.equal(same, vision.capture(pixels, ["vision.blocks.2"]).tokens["vision.blocks.2"])
    lost = min(needed)
    (folder / lost).unlink()
    with pytest.raises(ModelError, match=rf"{lost}, which holds .* cannot be read"):
        load(folder)


@pytest.mark.parametrize("prefix", ["vision_tower.vision_model.", "model.vision_tower.", "model.vision_tower.vision_model."])
def test_names_of_older_folders(copy: Path, vision: LlavaVision, prefix: str) -> None:
    outer = "model." if prefix.startswith("model.") else ""
    weights = load_file(copy / "model.safetensors")
    renamed = {
        name.replace("vision_tower.", prefix).replace("multi_modal_projector.", f"{outer}multi_modal_projector."): tensor
        for name, tensor in weights.items()
    }
    save_file(renamed, copy / "model.safetensors", metadata={"format": "pt"})
    pixels = plant(48, 16, [(1, 1)])[1]
    old, new = (model.capture(pixels, ["vision.projection"]).tokens["vision.projection"] for model in (load(copy), vision))
    assert torch.equal(old, new)


def test_attention_and_mlp_output_what_a_block_adds(folder: Path, vision: LlavaVision, images: list[Image.Image]) -> None:
    full: Any = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    pixels = pixels_of(vision, images)
    x = CLIPImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"].float()
    with torch.no_grad():
        states = full.model.vision_tower(x, output_hidden_states=True).hidden_states
    check_residual_stream(vision, states, pixels)


def test_bfloat16_is_close(folder: Path) -> None:
    check_bfloat16(lambda dtype: load(folder, dtype))


@pytest.mark.parametrize("next_", [False, True])
def test_planted_patch_goes_through_to_the_artefact(tmp_path: Path, next_: bool) -> None:
    folder = save_llava(tmp_path / "model", next_=next_)
    check_planted_patch_in_artefact(tmp_path, load(folder), {"kind": "llava", "path": str(folder)})


def test_loading_is_silent_and_leaves_the_random_state(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = torch.random.get_rng_state()
    load(folder)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.random.get_rng_state(), state)


FULL = "vision_feature_select_strategy"
CASES: list[tuple[dict[str, Any], int, list[str]]] = [
    ({}, 2, []),
    ({"vision_feature_layer": -1, FULL: "full"}, 3, []),
    ({"vision_feature_layer": 1}, 1, []),
    ({"vision_feature_layer": [1, -2]}, 2, ["vision.blocks.1"]),
    ({"vision_feature_layer": [0, 3]}, 3, ["vision.blocks.0", "vision.blocks.1", "vision.blocks.2"]),
    ({"siglip": True, "vision_feature_layer": -1, FULL: "full", "next_": True}, 3, []),
]


@pytest.mark.parametrize(("changes", "n_used", "bypassed"), CASES)
def test_splices_and_gradients_equal_hand_written_hooks_on_the_mean_token(
    tmp_path: Path, images: list[Image.Image], changes: dict[str, Any], n_used: int, bypassed: list[str]
) -> None:
    """Blocks after the layers that config.json selects have no effect, and those after the first of these layers are bypassed."""
    vision = load(save_llava(tmp_path, **changes))
    full: Any = (LlavaNextForConditionalGeneration if "next_" in changes else LlavaForConditionalGeneration).from_pretrained(tmp_path)
    model, config, pixels = full.eval().model, full.config, pixels_of(vision, images)
    x = by_processor(CLIPImageProcessorPil.from_pretrained(tmp_path), pixels)

    def run() -> torch.Tensor:
        states = model.vision_tower(x, output_hidden_states=True).hidden_states
        layers = config.vision_feature_layer
        chosen = torch.cat([states[layer] for layer in ([layers] if isinstance(layers, int) else layers)], dim=-1)
        return model.multi_modal_projector(chosen if config.vision_feature_select_strategy == "full" else chosen[:, 1:]).mean(1)

    modules = {}
    for i, block in enumerate(model.vision_tower.encoder.layers):
        modules |= {f"vision.blocks.{i}.attn": block.self_attn, f"vision.blocks.{i}.mlp": block.mlp, f"vision.blocks.{i}": block}
    modules["vision.projection"] = model.multi_modal_projector
    idle = [f"vision.blocks.{i}{part}" for i in range(n_used, 3) for part in PARTS]
    check_splice(vision, modules, run, pixels, bypassed=bypassed, without_effect=idle)
    check_gradients(vision, modules, run, pixels, without_effect=idle)
    check_splice_alone(vision, pixels, "vision.blocks.0")


def test_a_model_without_a_text_tower_embeds_no_text(vision: LlavaVision) -> None:
    with pytest.raises(ModelError, match="no text tower"):
        vision.embed_text(["dog"])


def edit_weights(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights | ({} if tensor is None else {name: tensor}), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["vision_tower.encoder.layers.1.mlp.fc1.bias", "multi_modal_projector.linear_2.weight"])
def test_missing_and_misshapen_weights_are_named(copy: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    shape = list(load_file(copy / "model.safetensors")[name].shape)
    edit_weights(copy, name, torch.zeros(7, 7))
    with pytest.raises(ModelError, match=rf"{name} has the shape \[7, 7\], but according to config.json \{shape}"):
        load(copy)
    edit_weights(copy, name, None)
    with pytest.raises(ModelError, match=rf"the weights lack {name}; is the file complete"):
        load(copy)
    assert capfd.readouterr() == ("", "")


def test_a_folder_without_the_weights_of_the_tower_is_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    language = {name: tensor for name, tensor in weights.items() if name.startswith("language_model")}
    save_file(language, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="the weights contain no vision_tower"):
        load(copy)
    (copy / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        load(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"missing in this folder: weights in safetensors"):
        load(copy)


def test_a_damaged_index_is_refused(copy: Path) -> None:
    (copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match=r"index\.json cannot be read"):
        load(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "clip"}, "is a clip model; kind llava takes model_type llava or llava_next"),
        ({"vision_config": {"model_type": "pixtral"}}, "its vision tower is a pixtral; kind llava takes clip_vision_model or siglip"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "the first patch would be lost; set it to full"),
        ({"vision_feature_layer": 4}, "vision_feature_layer 4; the tower has 4 hidden states"),
    ],
)
def test_the_config_of_another_model_is_refused(copy: Path, change: dict, message: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=message):
        load(copy)
