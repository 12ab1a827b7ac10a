"""The stage `intervene` makes tables of what is measured, gives every other latent a reason, and survives a model that is gone."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ommatid import quality, store
from ommatid.config import InterveneParams, Params
from ommatid.config.intervene import AnswersParams
from ommatid.errors import ConfigError, ModelError
from ommatid.events import Event, Warned, ignore
from ommatid.extract import networks
from ommatid.intervene import answers, stage
from ommatid.intervene.audit import leave_unaudited
from ommatid.intervene.measure import Measured
from ommatid.intervene.stage import NOT_CHOSEN, intervene
from ommatid.label.stage import label
from ommatid.store import Artefact, Draft
from ommatid.summaries import check_keys
from support.study import make_artefact, make_test_params
from support.tiles import D_SAE, DEAD, make_line

NUMBERS = {"outcome": "toward_label", "dose": 1.0, "act": 4.0, "effect_low": 0.25, "effect_high": 0.75, "best_control": 0.1}
MEASURED = Measured(
    interventions=[
        {"latent": 1, "outcome": "toward_label", "arm": "targeted", "dose": 1.0, "value": 0.5, "low": 0.25, "high": 0.75}
        | {"n_images": 16, "n_draws": 1}
    ],
    effects=[
        {"latent": 2, "status": "reads_only", "effect": 0.3, **NUMBERS, "best_control": 0.4},
        {"latent": 1, "status": "causal", "effect": 0.5, **NUMBERS},
        {"latent": 0, "status": "causal", "effect": 0.6, **NUMBERS},
        {"latent": 4, "status": "untested", "reason": "never fires"},
    ],
    attributions=[{"output": "red", "rank": 1, "latent": 0, "effect": 0.5, "exact": 0.4, "sparsity": 1.0, "n_images": 16}],
    zero_dose=0.0,
    random_causal=0.0,
)


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Params:
    words = tmp_path_factory.mktemp("words") / "words.txt"
    words.write_text("red\ngreen\nblue\ngrey\n")
    return make_test_params(
        extract={"hookpoints": ["tiles"], "tokens": "patch", "dtype": "float32"},
        train={"d_sae": D_SAE, "k": 1},
        evaluate={"baselines": []},
        label={"labellers": [{"kind": "vocabulary", "words": [str(words)]}], "min_examples": 2},
    )


@pytest.fixture(scope="module")
def line(params: Params, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Artefact]:
    return make_line(tmp_path_factory.mktemp("line"), params, label=label)


def run(place: Path, params: InterveneParams, line: Mapping[str, Artefact], events: list[Event]) -> Artefact:
    def collecting(params: InterveneParams, inputs: Mapping[str, Artefact], draft: Draft) -> Artefact:
        return intervene(params, inputs, draft, events.append)

    made = make_artefact(place, "effects", collecting, params, line)
    check_keys("effects", made.summary)
    return made


def use(monkeypatch: pytest.MonkeyPatch, measured: Measured) -> None:
    """Use what was measured, and an audit of nothing, in place of the model."""
    monkeypatch.setattr(stage, "Subject", lambda inputs, head: None)
    monkeypatch.setattr(stage, "measure", lambda *_: measured)
    monkeypatch.setattr(stage, "audit", lambda *_: leave_unaudited("not audited"))


def test_what_is_measured_becomes_tables_and_every_other_latent_says_that_it_was_not_chosen(
    tmp_path: Path, params: Params, line: Mapping[str, Artefact], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, MEASURED)
    events: list[Event] = []
    made = run(tmp_path / "effects", params.intervene, line, events)
    assert events == []
    effects = made.read("effects").to_pylist()
    assert [(row["latent"], row["status"], row["reason"]) for row in effects] == [
        (0, "causal", None),
        (1, "causal", None),
        (2, "reads_only", None),
        (3, "untested", NOT_CHOSEN),
        (4, "untested", "never fires"),
        (5, "untested", NOT_CHOSEN),
    ]
    assert made.read("interventions").to_pylist() == [{"sae": "planted", **MEASURED.interventions[0], "target": None}]
    assert made.read("attributions").to_pylist() == [{"sae": "planted", **MEASURED.attributions[0]}]
    assert [(row["sae"], row["status"]) for row in made.read("audits").to_pylist()] == [("planted", "not audited")]
    summary = dict(made.summary)
    ms = dict(zip(*line["evaluate"].read("latents", ["latent", "ms"]).to_pydict().values(), strict=True))
    order = sorted(range(3), key=lambda latent: ms[latent])  # the effects beyond the best control are 0.5, 0.4 and -0.1
    places = [order.index(latent) for latent in (2, 1, 0)]
    assert summary.pop("spearman_ms") == pytest.approx(1 - sum((i - place) ** 2 for i, place in enumerate(places)) / 4)
    assert summary == {
        "n_tested": 3,
        "n_causal": 2,
        "n_reads_only": 1,
        "n_breaks_model": 0,
        "n_untested": 3,
        "share_causal": pytest.approx(2 / 3),
        "random_causal": 0.0,
        "zero_dose": 0.0,
        "patch_accuracy": None,
        "reason": "ok",
    }


def test_masks_that_are_not_used_are_said_to_be_so(
    tmp_path: Path, params: Params, line: Mapping[str, Artefact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "measure_answers", lambda *_: MEASURED)
    events: list[Event] = []
    run(tmp_path / "effects", params.intervene.model_copy(update={"answers": AnswersParams(), "masks": "masks"}), line, events)
    assert events == [Warned("intervene.masks is not used: there are no outcomes by patch of a model that is asked for words")]


@pytest.mark.parametrize("source", ["gone", "files"])
def test_a_model_that_cannot_be_run_leaves_every_latent_untested_with_the_reason_and_passes_the_gate(
    tmp_path: Path, params: Params, line: Mapping[str, Artefact], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    def gone(*_: Any) -> None:
        raise ModelError("extract.model.path: no such folder")

    monkeypatch.setattr(networks, "load_model", gone)
    why = "extract.model.path: no such folder"
    if source == "files":
        why = "the activations were imported from files, and the model that they come from is not available"
        monkeypatch.delitem(line["extract"].manifest.params, "model")
    events: list[Event] = []
    with store.open_draft(tmp_path / "interventions", "interventions", {}, {}) as draft:
        child = draft.child("planted", "effects")
        intervene(params.intervene, line, child, events.append)
        draft.seal({"saes": ["planted"]})
        whole = draft.publish(tmp_path / "interventions")
    made = whole.each()["planted"]
    check_keys("effects", made.summary)
    assert events == [Warned(f"planted: no interventions: {why}")]
    assert [(row["status"], row["reason"]) for row in made.read("effects").to_pylist()] == [("untested", why)] * D_SAE
    assert made.rows("interventions") == made.rows("attributions") == made.rows("audit") == made.rows("audit_images") == 0
    assert made.read("audits")["status"].to_pylist() == [why]
    assert made.summary["reason"] == why and made.summary["n_untested"] == D_SAE
    assert all(made.summary[key] is None for key in ("share_causal", "random_causal", "zero_dose", "spearman_ms"))
    report = quality.check("intervene", whole, params, {"planted": params.train})
    assert report.success, report.failures


def test_rows_that_are_measured_twice_or_of_no_latent_reach_the_gate(
    tmp_path: Path, params: Params, line: Mapping[str, Artefact], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = [*MEASURED.effects, MEASURED.effects[0], {**MEASURED.effects[0], "latent": D_SAE}]
    use(monkeypatch, Measured([], odd, [], 0.0, None))
    latents = run(tmp_path / "effects", params.intervene, line, []).read("effects")["latent"].to_pylist()
    assert latents == [0, 1, 2, 2, 3, 4, 5, D_SAE]


def test_a_listed_latent_that_an_sae_does_not_have_is_refused_before_any_work(
    tmp_path: Path, params: Params, line: Mapping[str, Artefact]
) -> None:
    section = InterveneParams.model_validate(
        params.intervene.model_dump(mode="json") | {"latents": {"kind": "listed", "latents": [0, D_SAE]}}
    )

    class Evaluations:
        def each(self) -> Mapping[str, Artefact]:
            return {"narrow": line["evaluate"]}

    with (
        store.open_draft(tmp_path / "interventions", "interventions", {}, {}) as draft,
        pytest.raises(ConfigError, match=r"intervene\.latents\.latents: got 6, but the latents of narrow are 0 to 5; remove it"),
    ):
        stage.run(section, {"evaluate": Evaluations()}, draft, ignore)  # type: ignore[dict-item]


def test_a_list_of_dead_latents_is_refused_before_any_work(tmp_path: Path, params: Params, line: Mapping[str, Artefact]) -> None:
    section = InterveneParams.model_validate(params.intervene.model_dump(mode="json") | {"latents": {"kind": "listed", "latents": [DEAD]}})

    class Evaluations:
        def each(self) -> Mapping[str, Artefact]:
            return {"planted": line["evaluate"]}

    with (
        store.open_draft(tmp_path / "interventions", "interventions", {}, {}) as draft,
        pytest.raises(ConfigError, match=r"intervene\.latents\.latents: got 4, but all are dead in planted: .* list others"),
    ):
        stage.run(section, {"evaluate": Evaluations()}, draft, ignore)  # type: ignore[dict-item]


def test_a_stage_that_asks_no_model_for_words_imports_no_transformers() -> None:
    code = "import sys, ommatid.intervene.stage; print({'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
