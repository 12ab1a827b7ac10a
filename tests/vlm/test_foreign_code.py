"""Proves that no Python code in a model's folder runs, whoever loads it, and that one line says why."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.dynamic_module_utils import resolve_trust_remote_code
from typer.testing import CliRunner

from ommatid.cli.app import app
from ommatid.config.models import ClipModel, TransformersJudge
from ommatid.errors import ModelError
from ommatid.label.labellers.captioner import TransformersCaptions
from ommatid.vlm import hub, load_judge, load_model
from support.families import FAMILIES, save_tiny
from support.models import save_tiny_captioner

EVIL = """
from pathlib import Path
Path({canary!r}).touch()
class Evil:
    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        return cls()
"""
AUTO = ("AutoConfig", "AutoModel", "AutoImageProcessor", "AutoFeatureExtractor", "AutoModelForImageTextToText", "AutoModelForCausalLM")


@pytest.fixture(autouse=True)
def eager_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers yes to every question."""
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")


@pytest.fixture
def clip(tiny_clip: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_clip, tmp_path / "model"))


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "model", FAMILIES["vit"])
    return tmp_path / "model"


@pytest.fixture
def captioner(tmp_path: Path) -> Path:
    save_tiny_captioner(tmp_path / "captioner", "vision-encoder-decoder")
    return tmp_path / "captioner"


LOADERS: dict[str, Callable[[Path], object]] = {
    "clip": lambda folder: load_model(ClipModel(kind="clip", path=str(folder)), "float32", "cpu"),
    "judge": lambda folder: load_judge(TransformersJudge(kind="transformers", path=str(folder)), "float32", "cpu"),
    "captioner": lambda folder: TransformersCaptions(str(folder)),
}


def plant(folder: Path, file: str, **changes: Any) -> Path:
    """Write foreign code and a JSON file that asks for it; return the path of the file that the code would make."""
    canary = folder.parent / "canary"
    (folder / "evil.py").write_text(EVIL.format(canary=str(canary)))
    path = folder / file
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))
    return canary


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"model_type": "evil"}),
        ("preprocessor_config.json", {"image_processor_type": "EvilProcessor"}),
        ("processor_config.json", {"image_processor": {"image_processor_type": "EvilProcessor"}}),
    ],
)
def test_an_auto_map_is_not_followed(loader: str, file: str, changes: dict[str, Any], request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(loader)
    auto_map = dict.fromkeys(AUTO, "evil.Evil")
    changes = {name: value | {"auto_map": auto_map} if isinstance(value, dict) else value for name, value in changes.items()}
    canary = plant(folder, file, auto_map=auto_map, **changes)
    with pytest.raises(
        ModelError, match=r"path: .*requires Python code from the folder \(auto_map\), and code .* is never run; use"
    ) as caught:
        LOADERS[loader](folder)
    assert not canary.exists() and "evil" not in sys.modules
    assert "\n" not in str(caught.value)


def test_a_tokenizers_auto_map_is_not_followed(clip: Path, captioner: Path) -> None:
    changes = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    canary = plant(clip, "tokenizer_config.json", **changes)
    LOADERS["clip"](clip)  # transformers knows CLIP's tokenizer by itself
    plant(captioner, "tokenizer_config.json", **changes)
    with pytest.raises(ModelError, match=r"the tokenizer requires Python code from the folder"):
        LOADERS["captioner"](captioner)
    assert not canary.exists()


def test_a_model_that_transformers_knows_loads_without_the_code_that_it_brings(clip: Path) -> None:
    canary = plant(clip, "config.json", auto_map=dict.fromkeys(AUTO, "evil.Evil"))
    LOADERS["clip"](clip)
    LOADERS["judge"](clip)
    assert not canary.exists()


def test_an_auto_map_of_a_part_of_the_model_is_not_followed(captioner: Path) -> None:
    config = json.loads((captioner / "config.json").read_text())
    decoder = config["encoder"] | {"auto_map": dict.fromkeys(AUTO, "evil.Evil"), "_name_or_path": str(captioner)}
    canary = plant(captioner, "config.json", decoder=decoder)
    with pytest.raises(ModelError, match=r"a part of the model in config.json requires Python code"):
        LOADERS["captioner"](captioner)
    assert not canary.exists()


def test_kernels_of_the_hub_are_not_fetched(clip: Path) -> None:
    plant(clip, "config.json", attn_implementation="someone/kernels")
    with pytest.raises(ModelError, match=r"config.json says attn_implementation 'someone/kernels', which is code from the hub"):
        LOADERS["clip"](clip)


def test_a_backbone_from_the_hub_is_not_downloaded(clip: Path) -> None:
    plant(clip, "config.json", model_type="depth_anything", backbone="someone/backbone", use_timm_backbone=False)
    with pytest.raises(ModelError, match=r"config.json says backbone 'someone/backbone', whose config transformers would download"):
        LOADERS["judge"](clip)


def test_the_user_is_never_asked_whether_to_run_code() -> None:
    with pytest.raises(ModelError, match=r"a part requires Python code from the folder"), hub.reading("x", "key", "a part"):
        resolve_trust_remote_code(None, "x", has_local_code=False, has_remote_code=True)


def test_listing_hookpoints_runs_no_code_of_the_folder(clip: Path) -> None:
    canary = plant(clip, "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    result = CliRunner().invoke(app, ["hookpoints", str(clip)], input="y\ny\n")
    assert result.exit_code == 1 and isinstance(result.exception, ModelError | SystemExit)
    assert not canary.exists()


class Touch:
    """An object that writes the canary file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("way", ["pickle", "torch"])
def test_weights_are_not_unpickled(judge: Path, way: str) -> None:
    (judge / "model.safetensors").unlink()
    canary, path = judge.parent / "canary", judge / "pytorch_model.bin"
    if way == "pickle":
        path.write_bytes(pickle.dumps({"x": Touch(canary)}))
    else:
        torch.save({"x": Touch(canary)}, path)
    with pytest.raises(ModelError, match=r"extract.judge.path: .*the model (holds objects other than tensors|cannot be read)"):
        LOADERS["judge"](judge)
    assert not canary.exists()
