"""QwenVision equals, number by number, hand-written hooks on the full model of transformers, each patch at its own row and column."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ommatid.config.models import QwenModel
from ommatid.errors import ModelError
from ommatid.vlm import Hookpoint, load_model
from ommatid.vlm.preprocess import Preprocess
from ommatid.vlm.qwen import QwenVision, flatten_patches, patch_order
from support.models import plant, save_qwen, squares
from support.towers import (
    PARTS,
    OfOneSequence,
    check_bfloat16,
    check_gradients,
    check_planted_patch_in_artefact,
    check_reading,
    check_splice,
    check_splice_alone,
    check_trust,
)

SIZE = 64  # 16 x 16 patches of 4 pixels, 8 x 8 merge groups, windows of 3 x 3 groups: those at the right and the bottom are smaller
EVERY = [f"vision.blocks.{i}{suffix}" for i in range(4) for suffix in (".attn", ".mlp", "")]
PLACES = [(0, 0), (0, 7), (3, 12), (6, 5), (9, 1), (13, 14), (15, 15)]


def load(folder: Path, dtype: str = "float32", size: int = SIZE) -> QwenVision:
    model = load_model(QwenModel(kind="qwen", path=str(folder), image_size=size), dtype, "cpu")  # pyright: ignore[reportArgumentType]
    assert isinstance(model, QwenVision)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def vision(folder: Path) -> QwenVision:
    return load(folder)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8))


def processed(folder: Path, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    batch = Qwen2VLImageProcessorPil.from_pretrained(folder)(squares(pixels), return_tensors="pt", do_resize=False)
    return {"pixel_values": batch["pixel_values"].float(), "image_grid_thw": batch["image_grid_thw"]}


def order_by_hand(groups: int, window: int) -> list[tuple[int, int]]:
    """Return the positions of patches in the order of Qwen2.5-VL, by loops that follow the paper and the reference code."""
    places = []
    for top in range(0, groups, window):
        for left in range(0, groups, window):
            for group_row in range(top, min(top + window, groups)):
                for group_col in range(left, min(left + window, groups)):
                    places += [(2 * group_row + row, 2 * group_col + col) for row in (0, 1) for col in (0, 1)]
    return places


def in_rows(x: torch.Tensor, places: list[tuple[int, int]]) -> torch.Tensor:
    """Reorder (n * patches, d) from the tower's order to (n, patches, d), row by row."""
    out = torch.full((len(x) // len(places), 16, 16, x.shape[1]), torch.nan)
    for i, (row, col) in enumerate(places):
        out[:, row, col] = x.unflatten(0, (-1, len(places)))[:, i]
    return out.flatten(1, 2)


def test_the_checks_at_load_pass(vision: QwenVision) -> None:
    check_trust(vision)


def test_the_hookpoints_are_listed_in_order(vision: QwenVision) -> None:
    block = Hookpoint(d_model=32, special=(), grid=(16, 16))
    assert list(vision.hookpoints) == [*EVERY, "vision.projection"]
    assert {vision.hookpoints[name] for name in EVERY} == {block}
    assert vision.hookpoints["vision.projection"] == Hookpoint(d_model=40, special=(), grid=(8, 8))
    assert vision.d_embed is None and vision.text_templates == ()


@pytest.mark.parametrize("windows", [True, False])
def test_every_hookpoint_equals_hand_written_hooks(tmp_path: Path, pixels: torch.Tensor, windows: bool) -> None:
    folder = save_qwen(tmp_path, windows)
    full: Any = (Qwen2_5_VLForConditionalGeneration if windows else Qwen2VLForConditionalGeneration).from_pretrained(folder).eval()
    inputs = processed(folder, pixels)
    seen, handles = {}, []
    for i, block in enumerate(full.model.visual.blocks):
        for suffix, module in ((".attn", block.attn), (".mlp", block.mlp), ("", block)):

            def keep(_module: object, _inputs: object, output: torch.Tensor, name: str = f"vision.blocks.{i}{suffix}") -> None:
                seen[name] = output

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        merged = torch.stack(list(full.get_image_features(**inputs).pooler_output))
    for handle in handles:
        handle.remove()
    captured = load(folder).capture(pixels, [*EVERY, "vision.projection"])
    places = order_by_hand(8, 3 if windows else 1)
    assert captured.embedding is None and set(captured.tokens) == {*EVERY, "vision.projection"}
    for name in EVERY:
        torch.testing.assert_close(captured.tokens[name], in_rows(seen[name], places), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(captured.tokens["vision.projection"], merged, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 3, 6, 8])
def test_patch_order_equals_loops(groups: int) -> None:
    for window in (1, 3, 4):
        by_hand = [row * 2 * groups + col for row, col in order_by_hand(groups, window)]
        assert patch_order((2 * groups, 2 * groups), 2, window) == by_hand


@pytest.mark.parametrize("merge", [1, 2, 4])
def test_flattened_patches_are_those_of_the_processor(merge: int) -> None:
    images = torch.randn(2, 3, 32, 48)
    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=merge)
    expected = [processor.patchify(image.numpy(), 4, merge, 2)[0] for image in images]
    assert torch.equal(flatten_patches(images, 4, merge, 2), torch.from_numpy(np.concatenate(expected)))


def test_the_input_of_the_tower_equals_the_processors_output(vision: QwenVision, folder: Path, pixels: torch.Tensor) -> None:
    seen = []
    handle = vision._model.tower.register_forward_pre_hook(lambda _module, inputs: seen.extend(inputs))
    vision.capture(pixels, ["vision.blocks.0"])
    handle.remove()
    inputs = processed(folder, pixels)
    torch.testing.assert_close(seen[0], inputs["pixel_values"], atol=2e-6, rtol=0)
    assert torch.equal(seen[1], inputs["image_grid_thw"])


@pytest.mark.parametrize("hookpoint", ["vision.blocks.0", "vision.blocks.0.mlp", "vision.blocks.3"])
def test_bright_patch_is_found_at_its_row_and_column(vision: QwenVision, hookpoint: str) -> None:
    before, after = (vision.capture(pixels, [hookpoint]).tokens[hookpoint] for pixels in plant(SIZE, 4, PLACES))
    assert [divmod(int(i), 16) for i in (after - before).norm(dim=-1).argmax(1)] == PLACES


def test_bright_patch_is_found_in_its_merge_group(vision: QwenVision) -> None:
    name = "vision.projection"
    before, after = (vision.capture(pixels, [name]).tokens[name] for pixels in plant(SIZE, 4, PLACES))
    groups = [(row // 2, col // 2) for row, col in PLACES]
    assert [divmod(int(i), 8) for i in (after - before).norm(dim=-1).argmax(1)] == groups


def test_preprocessing_is_a_plain_resize_whose_boxes_lead_back(vision: QwenVision) -> None:
    preprocess = Preprocess(**json.loads(json.dumps(vision.preprocessing)))
    assert preprocess == vision.preprocess
    assert preprocess.resize == preprocess.crop == (SIZE, SIZE)
    assert preprocess.box(640, 200) == (0, 0, 640, 200)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 90, 3), dtype=np.uint8))
    assert np.array_equal(preprocess(image), np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))


def test_only_the_tower_is_read(copy: Path, vision: QwenVision, pixels: torch.Tensor) -> None:
    weights = load_file(copy / "model.safetensors")
    tower = {f"model.{name}": tensor for name, tensor in weights.items() if name.startswith("visual.")}  # as new folders name it
    save_file(tower, copy / "model.safetensors", metadata={"format": "pt"})
    name = "vision.projection"
    assert torch.equal(load(copy).capture(pixels, [name]).tokens[name], vision.capture(pixels, [name]).tokens[name])


def test_folder_as_on_the_hub(copy: Path, vision: QwenVision, pixels: torch.Tensor) -> None:
    """The config has the values of the language model at its top, and the preprocessor bounds the number of pixels instead of the sides."""
    config = json.loads((copy / "config.json").read_text())
    config |= config.pop("text_config") | {"model_type": "qwen2_5_vl"}
    config["vision_config"] |= {"in_chans": 3, "spatial_patch_size": 4}
    (copy / "config.json").write_text(json.dumps(config))
    preprocessor = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 4}
    (copy / "preprocessor_config.json").write_text(json.dumps(preprocessor | {"merge_size": 2, "temporal_patch_size": 2}))
    again, name = load(copy), "vision.blocks.2"
    assert again.preprocess == vision.preprocess
    assert torch.equal(again.capture(pixels, [name]).tokens[name], vision.capture(pixels, [name]).tokens[name])


def test_attention_and_mlp_output_what_a_block_adds(vision: QwenVision, pixels: torch.Tensor) -> None:
    x = vision.capture(pixels, EVERY).tokens
    for i in (1, 2, 3):
        block = f"vision.blocks.{i}"
        torch.testing.assert_close(x[f"vision.blocks.{i - 1}"] + x[f"{block}.attn"] + x[f"{block}.mlp"], x[block], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("windows", [True, False])
def test_bfloat16_is_close(tmp_path: Path, windows: bool) -> None:
    folder = save_qwen(tmp_path, windows)
    check_bfloat16(lambda dtype: load(folder, dtype))


def test_planted_patch_goes_through_to_the_artefact(tmp_path: Path, folder: Path) -> None:
    model = {"kind": "qwen", "path": str(folder), "image_size": 40}  # 10 x 10 patches, in windows of 6 and of 4
    check_planted_patch_in_artefact(tmp_path, load(folder, size=40), model)


def test_image_size_must_fit_the_merge_groups(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"extract\.model\.image_size: 60 is not a multiple of 8, .* such as 64"):
        load(folder, size=60)


@pytest.mark.parametrize("windows", [True, False])
def test_splices_and_gradients_equal_hand_written_hooks_on_the_mean_token(tmp_path: Path, pixels: torch.Tensor, windows: bool) -> None:
    vision = load(save_qwen(tmp_path, windows))
    full: Any = (Qwen2_5_VLForConditionalGeneration if windows else Qwen2VLForConditionalGeneration).from_pretrained(tmp_path).eval()
    inputs, tower = processed(tmp_path, pixels), full.model.visual
    modules = {f"vision.blocks.{i}{suffix}": block.get_submodule(suffix[1:]) for i, block in enumerate(tower.blocks) for suffix in PARTS}
    modules["vision.projection"] = tower.merger
    places = order_by_hand(8, 3 if windows else 1)
    groups = [(row // 2, column // 2) for row, column in places[::4]]
    order = OfOneSequence({name: groups if module is tower.merger else places for name, module in modules.items()})

    def run() -> torch.Tensor:
        return torch.stack([tokens.mean(0) for tokens in full.get_image_features(**inputs).pooler_output])

    for check in (check_splice, check_gradients):
        check(vision, modules, run, pixels, order)
    check_splice_alone(vision, pixels, "vision.blocks.1")
    check_reading(vision, pixels, "vision.blocks.1.attn", "vision.blocks.2")


def test_a_model_without_a_text_tower_embeds_no_text(vision: QwenVision) -> None:
    with pytest.raises(ModelError, match="no text tower"):
        vision.embed_text(["dog"])


def test_bad_folders_are_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    save_file(weights | {"visual.blocks.1.attn.qkv.bias": torch.zeros(3)}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"visual\.blocks\.1\.attn\.qkv\.bias has the shape \[3\], but according to config\.json \[96\]"):
        load(copy)
    (copy / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match="is a vit model; kind qwen takes model_type qwen2_5_vl or qwen2_vl"):
        load(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="missing in this folder: weights in safetensors"):
        load(copy)
