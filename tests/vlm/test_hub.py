"""Mistakes with transformers models end in one sentence: no network, missing files, another kind of model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from ommatid.config.models import ClipModel, TransformersJudge
from ommatid.errors import ModelError
from ommatid.vlm import load_judge, load_model


@pytest.fixture
def folder(tiny_clip: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_clip, tmp_path / "clip"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets at import


def load(path: Path | str) -> object:
    return load_model(ClipModel(kind="clip", path=str(path)), "float32", "cpu")


def edit(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.usefixtures("no_network")
def test_a_hub_name_without_network_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ModelError, match=r"extract\.model\.path: nobody/no-clip.*no network.*\{kind: lite\}.*folder"):
        load("nobody/no-clip")
    with pytest.raises(ModelError, match=r"extract\.judge\.path: nobody/no-dino.*no network.*\{kind: lite\}.*folder"):
        load_judge(TransformersJudge(kind="transformers", path="nobody/no-dino"), "float32", "cpu")


def test_a_path_that_is_neither_folder_nor_hub_name_is_refused() -> None:
    with pytest.raises(ModelError, match=r"\./models/a/b: no such folder, and not a hub name"):
        load("./models/a/b")


@pytest.mark.parametrize("whole", [True, False])
def test_cache_is_used_without_network_only_where_whole(
    tiny_clip: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    if not whole:
        (folder / "model.safetensors").unlink()
    asked = []

    def snapshot_download(name: str, local_files_only: bool = False, allow_patterns: list[str] | None = None) -> str:
        asked.append("cache" if local_files_only else "hub")
        return str(folder if local_files_only else tiny_clip)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    load("some/clip")
    assert asked == (["cache"] if whole else ["cache", "hub"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model.safetensors"], r"missing in this folder: weights \(\*\.safetensors"),
        (["config.json"], r"missing in this folder: config\.json"),
        (["preprocessor_config.json"], r"missing in this folder: preprocessor_config\.json"),
        (["tokenizer.json", "config.json"], r"missing in this folder: config\.json; a tokenizer"),
    ],
)
def test_missing_files_are_named_at_once(folder: Path, files: list[str], message: str) -> None:
    for name in files:
        (folder / name).unlink()
    with pytest.raises(ModelError, match=message):
        load(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="the model cannot be read"):
        load(folder)


def test_incomplete_weights_are_refused_and_not_initialised_at_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"weights lack visual_projection\.weight"):
        load(folder)


def test_wrong_shapes_are_named(folder: Path) -> None:
    edit(folder / "config.json", lambda values: values["vision_config"].update(intermediate_size=48))
    with pytest.raises(
        ModelError, match=r"vision_model\.encoder\.layers\.0\.mlp\.fc1\.bias have the shape \[64\], but according to config\.json \[48\]"
    ):
        load(folder)


def test_a_broken_config_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        load(folder)


def test_another_kind_of_model_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match="is a vit model; kind clip takes"):
        load(folder)


def test_a_preprocessor_that_disagrees_with_the_config_is_refused(folder: Path) -> None:
    edit(folder / "preprocessor_config.json", lambda values: values.update(crop_size={"height": 32, "width": 32}))
    with pytest.raises(ModelError, match=r"crops to 32 x 32, but config\.json says image_size 48"):
        load(folder)


@pytest.mark.parametrize("change", [{"do_center_crop": False}, {"size": {"shortest_edge": 40}}, {"size": {"longest_edge": 40}}])
def test_preprocessing_without_a_fixed_size_is_refused(folder: Path, change: dict) -> None:
    edit(folder / "preprocessor_config.json", lambda values: values.update(change))
    with pytest.raises(ModelError, match="preprocessing must end in one fixed size"):
        load(folder)


def test_loading_is_silent_and_leaves_the_random_state(tiny_clip: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = torch.random.get_rng_state()
    load(tiny_clip)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.random.get_rng_state(), state)
