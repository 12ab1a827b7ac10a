"""Proves that each family listed in docs/users/models.md passes the checks at load, and that each refusal names its cause."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ommatid.config.models import TransformersJudge
from ommatid.errors import ModelError
from ommatid.vlm import Judge, load_judge
from ommatid.vlm.network_checks import check_judge
from ommatid.vlm.precision import normalise
from support.families import FAMILIES, REFUSED, save_tiny
from support.study import CHECKOUT

KEY = "extract.judge"


def load(folder: Path) -> Judge:
    return load_judge(TransformersJudge(kind="transformers", path=str(folder)), "float32", "cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_passes_as_a_judge(tmp_path: Path, family: str) -> None:
    model: Any = save_tiny(tmp_path, FAMILIES[family])
    assert model.config.model_type == family
    judge = load(tmp_path)
    check_judge(judge, KEY, torch.float32)
    pixels = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    assert torch.equal(judge.embed(pixels), load(tmp_path).embed(pixels))  # two extractions


def test_the_documentation_lists_these_families() -> None:
    text = " ".join((CHECKOUT / "docs/users/models.md").read_text(encoding="utf-8").split())
    listed = text.partition("(`tests/vlm/test_network_checks.py`): ")[2].partition(". ")[0]
    assert listed.split(", ") == sorted(FAMILIES)


def test_without_a_class_token_the_mean_of_the_tokens_judges(tmp_path: Path) -> None:
    model: Any = save_tiny(tmp_path, FAMILIES["ijepa"])
    pixels, judge = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8), load(tmp_path)
    with torch.no_grad():
        tokens = model(normalise(pixels, judge.preprocess, "cpu")).last_hidden_state
    torch.testing.assert_close(judge.embed(pixels), tokens.mean(1), atol=1e-5, rtol=1e-5)


def test_a_masked_autoencoder_judges_by_the_whole_image(tmp_path: Path) -> None:
    model: Any = save_tiny(tmp_path, FAMILIES["vit_mae"])
    grey, judge = torch.full((4, 64, 64, 3), 128, dtype=torch.uint8), load(tmp_path)
    alone, batch = judge.embed(grey[:1]), judge.embed(grey)
    torch.testing.assert_close(batch, alone.expand(4, -1), atol=1e-6, rtol=1e-6)
    cls, patches = model.embeddings.cls_token, model.embeddings.patch_embeddings(normalise(grey, judge.preprocess, "cpu"))
    with torch.no_grad():
        states = torch.cat([cls.expand(4, -1, -1), patches], dim=1) + model.embeddings.position_embeddings
        for layer in model.layers:
            states = layer(states)
        torch.testing.assert_close(batch, model.layernorm(states)[:, 0], atol=1e-5, rtol=1e-5)


def test_the_features_of_flava_are_those_of_its_class_token(tmp_path: Path) -> None:
    model: Any = save_tiny(tmp_path, FAMILIES["flava"])
    pixels, judge = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8), load(tmp_path)
    with torch.no_grad():
        features = model.get_image_features(normalise(pixels, judge.preprocess, "cpu")).pooler_output
    assert features.shape[:2] == (3, 17)
    torch.testing.assert_close(judge.embed(pixels), features[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_cannot_judge_are_refused_by_their_cause(tmp_path: Path, family: str) -> None:
    case, reason = REFUSED[family]
    save_tiny(tmp_path, case)
    with pytest.raises(ModelError, match=f"{KEY}.path: .*{reason}"):
        load(tmp_path)
