"""Proves that a model loads or is refused in one short sentence, in little memory, whatever value of its folder's JSON is changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ommatid.config.models import ClipModel, TransformersJudge, VitModel
from ommatid.errors import ModelError
from ommatid.vlm import load_judge, load_model
from support.families import FAMILIES, save_tiny
from support.models import save_tiny_clip
from support.mutated import iter_mutated

KINDS: dict[str, Callable[[str], object]] = {
    "vit": lambda path: load_model(VitModel(kind="vit", path=path), "float32", "cpu"),
    "clip": lambda path: load_model(ClipModel(kind="clip", path=path), "float32", "cpu"),
    "mobilevit": lambda path: load_judge(TransformersJudge(kind="transformers", path=path), "float32", "cpu"),
    "levit": lambda path: load_judge(TransformersJudge(kind="transformers", path=path), "float32", "cpu"),
}


@pytest.fixture
def folder(kind: str, tmp_path: Path) -> Path:
    if kind == "clip":
        save_tiny_clip(tmp_path)
    else:
        save_tiny(tmp_path, FAMILIES[kind])
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "file", "step"),
    [
        ("vit", "preprocessor_config.json", 3),
        ("vit", "config.json", 7),
        ("clip", "config.json", 29),
        ("clip", "tokenizer_config.json", 8),
        ("mobilevit", "preprocessor_config.json", 17),
        ("levit", "preprocessor_config.json", 9),
    ],
)
def test_a_mutated_folder_loads_or_is_refused(folder: Path, kind: str, file: str, step: int) -> None:
    outcomes = {"loaded": 0, "refused": 0}
    for what, values in iter_mutated(json.loads((folder / file).read_text()), step):
        (folder / file).write_text(json.dumps(values))
        try:
            KINDS[kind](str(folder))
            outcomes["loaded"] += 1
        except ModelError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error) and len(str(error)) < 1000, what
        except Exception as error:
            raise AssertionError(f"{kind}: {file} with {what}: {error!r}") from error
    assert min(outcomes.values()) > 0, outcomes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"resample": "bicubic"}, r"resample: got 'bicubic'; input should be a valid integer"),
        ({"resample": 9}, "resample: got 9; input should be less than or equal to 5"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean.2: missing; add it"),
        ({"image_std": [0.5, 0.5, 0]}, r"image_std.2: got 0; input should be greater than 0"),
        ({"image_std": [0.5, 0.5, float("nan")]}, r"image_std.2: got nan; input should be"),
        ({"size": {"height": -64, "width": 64}}, "size.height: got -64; input should be greater than or equal to 1"),
        ({"size": {"height": 64, "width": 100_000}}, "size.width: got 100000; input should be less than or equal to 4096"),
        ({"size": {"height": 64, "width": "64"}}, "size.width: got '64'; input should be a valid integer"),
        ({"do_resize": "no"}, "do_resize: got 'no'; input should be a valid boolean"),
        ({"rescale_factor": 0}, "rescale_factor: got 0; input should be greater than 0"),
    ],
)
@pytest.mark.parametrize("kind", ["vit"])
def test_settings_of_a_processor_are_checked(folder: Path, changes: dict[str, Any], reason: str, kind: str) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=rf"^extract.model.path: .*: preprocessor_config.json: {reason}"):
        KINDS[kind](str(folder))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": 10**12}, "hidden_size 1000000000000; no model has more than"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers 1000000; no model has more than 1024"),
        ({"intermediate_size": 2**23}, "the model has [0-9]+ parameters according to config.json, but the weights hold at most"),
    ],
)
@pytest.mark.parametrize("kind", ["vit"])
def test_a_huge_model_is_refused_before_it_is_made(folder: Path, changes: dict[str, Any], reason: str, kind: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=rf"^extract.model.path: .*{reason}"):
        KINDS[kind](str(folder))
