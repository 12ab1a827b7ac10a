"""What cannot be measured is refused or left out, with a reason that a user understands."""

from typing import Any

import pytest
import torch

from ommatid.config import Params
from ommatid.config.intervene import ListedLatents
from ommatid.intervene.measure import Measured, measure
from ommatid.intervene.subject import Subject
from ommatid.store import Artefact
from support.figure_model import (
    D_MODEL,
    GRID,
    PLANTED,
    FigureModel,
    make_figure_labels,
    make_figure_line,
    make_figure_params,
    use_figure_model,
)


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Params:
    return make_figure_params(tmp_path_factory.mktemp("plan"), doses=[0, 1], n_images=24, draws=3, max_drift=2.0)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, params: Params) -> dict[str, Artefact]:
    folder = tmp_path_factory.mktemp("line")
    made = make_figure_line(folder, params)
    made["label"] = make_figure_labels(folder / "labels", params, made, dict(enumerate(PLANTED)))
    return made


def run(line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch, *latents: int, **changes: Any) -> Measured | str:
    use_figure_model(monkeypatch)
    chosen = ListedLatents(kind="listed", latents=latents)
    return measure(params.intervene.model_copy(update={"latents": chosen, **changes}), Subject(line), lambda event: None)


def test_tokens_that_the_output_is_not_computed_from_are_said_to_be_so(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the patches after the last block of a model whose output is the class token: no latent of them only reads."""
    monkeypatch.setattr(FigureModel, "_read", lambda model, last: model.bias + 0 * last.sum((1, 2))[:, None])
    said = "the model's output stays the same whatever is done to the patch tokens at first: it is not computed from them; choose"
    assert str(run(line, params, monkeypatch, 0)).startswith(said)


def test_more_images_than_there_are_is_all_of_them(line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    n_eval = line["images"].summary["n_eval"]
    found = run(line, params, monkeypatch, 0, n_images=10**6, doses=(1.0,))
    assert isinstance(found, Measured)
    assert {row["n_images"] for row in found.interventions if row["outcome"] == "drift"} == {n_eval}


def test_a_latent_that_fires_on_none_of_the_images_can_be_set_but_not_removed(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ommatid.intervene import study

    def silent(one: study.Study) -> list[int]:
        found = list(original.func(one))
        table = one.subject.inputs["images"].read("images", ["image", "split", "label"]).to_pylist()
        return [row["image"] for row in table if row["split"] == "eval" and row["label"] != PLANTED[0]][: len(found)]

    original = study.Study.__dict__["images"]
    monkeypatch.setattr(study.Study, "images", property(silent))
    found = run(line, params, monkeypatch, 0, draws=20)
    assert isinstance(found, Measured)
    (effect,) = found.effects
    assert effect["status"] in ("causal", "breaks_model") and effect["dose"] == 1.0
    removal = [row for row in found.interventions if (row["arm"], row["dose"], row["outcome"]) == ("targeted", 0.0, "drift")]
    assert [row["value"] for row in removal] == [0.0]


def test_pooled_tokens_cannot_be_edited(line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(line["extract"].manifest.params, "tokens", "pooled")
    monkeypatch.setattr(Subject, "_check_weights", lambda *_: None)
    said = run(line, params, monkeypatch, 0)
    assert said == "extract.tokens: pooled is the mean of the patches at first, not a token that can be replaced"


def test_an_sae_of_a_model_with_other_weights_is_refused(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FigureModel, "_tokens", lambda model, image: torch.ones(GRID[0] * GRID[1], D_MODEL) * image.float().mean())
    assert "bring back the weights of then, or run `dvc repro extract`" in str(run(line, params, monkeypatch, 0))
