"""Proves that networks which compute the same have the same state, and that a change of any weight or setting changes it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ommatid.config.models import ClipModel, LiteModel, ModuleModel, TransformersJudge, VitModel
from ommatid.extract.cache import _state_digest
from ommatid.vlm import load_judge, load_model, user_code
from support.models import SIZES


def state(network: Any) -> str:
    return _state_digest(network.state)


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A ViT whose files lack the pooler, which transformers then fills with random numbers."""
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SIZES, image_size=48, patch_size=16), add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    CLIPImageProcessorPil(size={"height": 48, "width": 48}, do_center_crop=False).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def clip(tmp_path: Path, tiny_clip: Path) -> Path:
    return shutil.copytree(tiny_clip, tmp_path / "clip")


def load_vit(path: Path) -> Any:
    return load_model(VitModel(kind="vit", path=str(path)), "float32", "cpu")


def load_clip(path: Path) -> Any:
    return load_model(ClipModel(kind="clip", path=str(path)), "float32", "cpu")


def load_transformers_judge(path: Path) -> Any:
    return load_judge(TransformersJudge(kind="transformers", path=str(path)), "float32", "cpu")


@pytest.mark.parametrize("load", [load_vit, load_transformers_judge])
def test_weights_that_the_files_lack_do_not_count(vit: Path, load: Callable[[Path], Any]) -> None:
    assert state(load(vit)) == state(load(vit))


@pytest.mark.parametrize("load", [load_clip, load_transformers_judge])
def test_a_weight_and_a_setting_of_a_folder_count_but_not_its_place(clip: Path, tmp_path: Path, load: Callable[[Path], Any]) -> None:
    first = state(load(clip))
    assert state(load(clip.rename(tmp_path / "moved"))) == first
    (tmp_path / "moved").rename(clip)
    config = json.loads((clip / "config.json").read_text())
    config["vision_config"]["layer_norm_eps"] = 0.1
    old = (clip / "config.json").read_text()
    (clip / "config.json").write_text(json.dumps(config))
    assert state(load(clip)) != first
    (clip / "config.json").write_text(old)
    weights = load_file(clip / "model.safetensors")
    weights["vision_model.encoder.layers.2.mlp.fc2.bias"][3] += 1e-3
    save_file(weights, clip / "model.safetensors", {"format": "pt"})
    assert state(load(clip)) != first


def test_the_built_in_networks_differ_by_variant_size_and_role() -> None:
    def lite(variant: Any, size: int) -> LiteModel:
        return LiteModel(kind="lite", variant=variant, image_size=size)

    networks = [load_judge(lite(variant, size), "float32", "cpu") for variant, size in (("lite0", 64), ("lite2", 64), ("lite0", 96))]
    states = [state(network) for network in networks]
    assert len(set(states)) == 3
    assert state(load_judge(lite("lite0", 64), "float32", "cpu")) == states[0]
    assert state(load_judge(lite("lite0", 64), "bfloat16", "cpu")) != states[0]


def test_code_of_a_users_module_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    text = (
        "import torch\nfrom {parts} import Part\n\ndef make():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, 8), Part())\n"
    )
    part = "import torch\n\nclass Part(torch.nn.Module):\n    def forward(self, x):\n        return x * {factor}\n"
    states = []
    for i, factor in enumerate((2, 2, 3)):
        (tmp_path / f"factory_{i}.py").write_text(text.format(parts=f"parts_{i}"))
        (tmp_path / f"parts_{i}.py").write_text(part.format(factor=factor))
        params = ModuleModel.model_validate({"kind": "module", "factory": f"factory_{i}:make", "crop": [32, 32], "resize": [32]})
        model: Any = load_model(params, "float32", "cpu")
        states.append({name: value for name, value in model.state.items() if name != "settings"})
        states[-1]["parts"] = user_code.checksum_of_parts(model._module)
    digests = [_state_digest(found) for found in states]
    assert digests[0] == digests[1] != digests[2]
