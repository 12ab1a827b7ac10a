"""The family of a model is recognised from its name, and `ommatid hookpoints` lists where its activations can be captured."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ommatid.cli.app import app
from ommatid.config.models import ClipModel, DinoModel, LiteModel, LlavaModel, ModuleModel, QwenModel, SiglipModel, VitModel
from ommatid.errors import ConfigError, ModelError
from ommatid.vlm.identify import identify
from support.models import save_llava, save_qwen
from support.study import CHECKOUT


def lines(*arguments: str) -> list[list[str]]:
    """Return the cells of the table, whose columns are two spaces apart."""
    result = CliRunner().invoke(app, ["hookpoints", *arguments], catch_exceptions=False)
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in result.stdout.splitlines()]


@pytest.mark.parametrize(
    ("model_type", "section"),
    [
        ("clip", ClipModel),
        ("siglip", SiglipModel),
        ("dinov2", DinoModel),
        ("dinov2_with_registers", DinoModel),
        ("dinov3_vit", DinoModel),
        ("vit", VitModel),
        ("deit", VitModel),
        ("llava", LlavaModel),
        ("llava_next", LlavaModel),
        ("qwen2_5_vl", QwenModel),
        ("qwen2_vl", QwenModel),
    ],
)
def test_folders_are_known_by_their_config(tmp_path: Path, model_type: str, section: type) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    found = identify(str(tmp_path))
    assert type(found) is section
    assert getattr(found, "path", None) == str(tmp_path)


def test_names_of_embedded_models_and_modules_need_no_folder() -> None:
    assert identify("lite2") == LiteModel(kind="lite", variant="lite2")
    assert identify("module:my_pkg.models:make") == ModuleModel(kind="module", factory="my_pkg.models:make")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lite1", "MODEL: lite1: no such folder; name lite0, lite2, a folder, OWNER/NAME"),
        ("module:my_model", "MODEL: module:my_model: expected module:PACKAGE.MODULE:FUNCTION, such as"),
        ("./no/such/folder", "no such folder, and not a hub name"),
    ],
)
def test_unknown_names_are_refused(spec: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        identify(spec)


def test_a_folder_of_an_unknown_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match=r"is a bert model; supported types are clip, siglip, dinov2, .*qwen2_vl; load any other with"):
        identify(str(tmp_path))


def test_verb_lists_the_model_of_params(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)
    header, first, *_, last = lines("--set", "extract.model={kind: lite, variant: lite0, image_size: 64}")
    assert header == ["hookpoint", "tokens", "grid", "d_model"]
    assert first == ["blocks.0", "1024 patch", "32 x 32", "16"]
    assert last == ["head", "4 patch", "2 x 2", "1280"]


def test_verb_needs_a_model_where_activations_come_from_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)
    with pytest.raises(ConfigError, match=r"extract\.source is files: .* name a MODEL"):
        lines("--set", "extract={source: files, path: x, name: x, model: x}", "--set", "train.hookpoint=null")


def test_verb_lists_the_embedded_model_by_name() -> None:
    assert lines("lite0")[-2:] == [["blocks.15", "16 patch", "4 x 4", "320"], ["head", "16 patch", "4 x 4", "1280"]]


def test_verb_lists_a_folder(tmp_path: Path) -> None:
    assert lines(str(save_llava(tmp_path / "llava")))[-2:] == [
        ["vision.blocks.2", "1 cls, 9 patch", "3 x 3", "32"],
        ["vision.projection", "9 patch", "3 x 3", "40"],
    ]
    assert lines(str(save_qwen(tmp_path / "qwen")))[-1] == ["vision.projection", "3136 patch", "56 x 56", "40"]


def test_verb_lists_a_module_in_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 8, 16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten())\n"
    (tmp_path / "listed_model.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert lines("module:listed_model:make")[1:] == [
        ["0", "196 patch", "14 x 14", "8"],
        ["1", "1 pooled", "-", "8"],
        ["2", "1 pooled", "-", "8"],
    ]
