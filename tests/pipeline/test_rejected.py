"""Proves that an SAE that fails a gate does not affect the others: they are published, and it is kept with the reason.

Drawn tiles and the model that sees their colours: by `run_stage` and `ommatid` with the real gates and a real MLflow store. The tests
of this file run in order: each needs the artefacts of the one before.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from ommatid import quality
from ommatid.catalog.reader import Catalog
from ommatid.cli import app
from ommatid.config import EvaluateParams, Params, TrainParams, make_params
from ommatid.errors import ArtefactError, GateError, TrainingError
from ommatid.events import Event, Warned, ignore
from ommatid.pipeline import open_stage
from ommatid.pipeline.run import run_stage
from ommatid.publish import champion
from ommatid.quality import Report
from ommatid.sae.learner import Learner
from ommatid.sae.model import SAE
from ommatid.sae.step import Batch
from ommatid.store import Artefact, Draft
from support.study import make_test_params
from support.tiles import COLOURS, TileModel, use_tile_model, write_tile_folder

GOOD, WIDE, NARROW, BAD = "batch_topk-12-k2-s0", "batch_topk-40-k3-s0", "batch_topk-9-k2-s0", "relu-32-k1-s0"
RUNS: list[dict[str, Any]] = [{"d_sae": 12, "k": 2}, {"variant": "relu", "d_sae": 32, "k": 1, "lr": 1e-9}, {}, {"d_sae": 9, "k": 2}]
"""The SAEs of the training, of which the second fails the gate: half of its latents fire, although one should."""


@pytest.fixture(scope="module", autouse=True)
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    root, model = tmp_path_factory.mktemp("checkout"), TileModel()
    write_tile_folder(root / "photos", 100)
    (root / "words.txt").write_text("\n".join(COLOURS))
    params = make_test_params(
        images={"source": {"kind": "folder", "path": "photos"}, "limit": None},
        extract={"hookpoints": ["tiles"], "tokens": "all", "dtype": "float32"},
        train={"hookpoint": "tiles", "epochs": 20, "batch_size": 64, "lr": 0.01, "max_dead": 1.0, "d_sae": 40, "k": 3, "runs": RUNS},
        label={"labellers": [{"kind": "vocabulary", "words": ["words.txt"]}], "min_examples": 2},
    )
    (root / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        use_tile_model(patch, model)
        for stage in ("images", "extract"):
            run_stage(stage, params, ignore)
        yield


@pytest.fixture
def params() -> Params:
    return make_params(yaml.safe_load(Path("params.yaml").read_text()), "params.yaml")


def changed(params: Params, **train: Any) -> Params:
    return params.model_copy(update={"train": TrainParams.model_validate(params.train.model_dump(mode="json") | train)})


def run(*arguments: str) -> int:
    """Run `ommatid ...` in this process, and return its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ommatid", *arguments])
        with pytest.raises(SystemExit) as end:
            app.main()
        return int(end.value.code or 0)


def runs_of_training() -> dict[str, Any]:
    """Return the last MLflow run of each SAE, by name."""
    found = MlflowClient(f"sqlite:///{Path.cwd()}/.mlflow/mlflow.db").search_runs(["1"], order_by=["attributes.start_time ASC"])
    return {f"{one.info.run_name}": one for one in found}


def rejected_of(artefact: Artefact) -> dict[str, Artefact]:
    return {name: one for name, one in artefact.leaving_out(()).each().items() if name in artefact.rejected}


class Killed(BaseException):
    """Stands for a signal that ends a stage."""


def test_the_other_saes_are_published_and_the_exit_status_reports_the_rejected_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train") == 3
    said = capsys.readouterr().out
    assert f"notice: train: {BAD} is rejected: the final FVU is below 1: step " in said and f"it is kept in data/sae/{BAD}" in said
    assert said.rstrip().endswith(f"1 rejected: {BAD}")
    training = open_stage("train")
    assert set(training.children) == {GOOD, WIDE, NARROW} == set(training.each()) == set(training.summary["of"])
    assert list(training.rejected) == [BAD] and training.rejected[BAD].startswith("the final FVU is below 1: ")
    with pytest.raises(ArtefactError, match=f"{BAD} was rejected: the final FVU is below 1"):
        training.child(BAD, "sae")
    report = yaml.safe_load(Path("data/quality/train.json").read_text())
    assert not report["success"] and report["rejected"] == [{"sae": BAD, "reason": training.rejected[BAD]}]
    page = Path("data/quality/train.html").read_text()
    assert "1 rejected" in page and f"<b>{BAD}</b>" in page and "not published" not in page


def test_a_rejected_sae_can_be_inspected() -> None:
    open_stage("train").verify()
    (bad,) = rejected_of(open_stage("train")).values()
    assert SAE.load(bad.path).config.d_sae == 32 and bad.rows("curves") and bad.folder.url == f"data/sae/{BAD}"
    assert Path(f"data/quality/health/{BAD}.png").exists()


def test_the_mlflow_run_of_the_rejected_sae_fails_and_the_others_finish() -> None:
    found = runs_of_training()
    assert {name: one.info.status for name, one in found.items()} == {BAD: "FAILED"} | dict.fromkeys((GOOD, WIDE, NARROW), "FINISHED")
    assert "Rejected: the final FVU is below 1" in found[BAD].data.tags["mlflow.note.content"] and "ommatid.sae" not in found[BAD].data.tags


@pytest.fixture(scope="module")
def digest() -> str:
    """Return the digest of the training with the SAE that fails."""
    return open_stage("train").digest


def test_the_other_saes_do_not_depend_on_the_rejected_one(digest: str, params: Params) -> None:
    with_it = {name: sae.digest for name, sae in open_stage("train").each().items()}
    without = run_stage("train", changed(params, runs=[RUNS[0], *RUNS[2:]]), ignore)
    assert not without.rejected and {name: sae.digest for name, sae in without.each().items()} == with_it
    assert without.digest != digest


def test_a_run_killed_after_the_gate_continues_without_training_again(
    digest: str, params: Params, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Draft, "publish", kill)
        run_stage("train", params, ignore)
    assert not open_stage("train").rejected
    capsys.readouterr()
    assert run("train", "--allow-rejected") == 0
    said = capsys.readouterr().out
    assert f"notice: train: {BAD} is rejected: " in said and "train steps" not in said
    again = open_stage("train")
    assert list(again.rejected) == [BAD] and again.digest == digest
    assert sorted(path.name for path in Path("data/sae").iterdir()) == sorted([GOOD, WIDE, NARROW, BAD, "manifest.json"])


def test_evaluate_skips_saes_that_train_rejected_and_rejects_by_its_own_gate(params: Params) -> None:
    strict = EvaluateParams.model_validate(params.evaluate.model_dump(mode="json") | {"max_dead": 0.5})
    heard: list[Event] = []
    made = run_stage("evaluate", params.model_copy(update={"evaluate": strict}), heard.append)
    assert set(made.children) == {GOOD, NARROW} and list(made.rejected) == [WIDE]
    assert made.rejected[WIDE].startswith("few latents are dead: ")
    said = [event.what for event in heard if isinstance(event, Warned)]
    assert f"evaluate: {BAD} is left out because train rejected it: {open_stage('train').rejected[BAD]}" in said
    assert f"evaluate: {WIDE} is rejected: {made.rejected[WIDE]}; it is kept in data/evaluation/{WIDE}, but no later stage reads it" in said
    assert rejected_of(made)[WIDE].rows("latents") == 40
    logged = runs_of_training()
    assert {name: one.info.status for name, one in logged.items()} == dict.fromkeys((BAD, WIDE), "FAILED") | dict.fromkeys(
        (GOOD, NARROW), "FINISHED"
    )
    assert logged[WIDE].data.tags["ommatid.rejected.evaluate"] == made.rejected[WIDE]
    assert logged[WIDE].data.metrics["evaluate.dead"] > 0.5


def test_label_skips_both_rejected_saes_and_rejects_a_third(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = Path("labels.csv")  # of SAEs that were rejected, too: what people wrote stays good
    labels.write_text("".join(["sae,latent,label\n", *(f"{name},0,red\n" for name in (GOOD, WIDE, NARROW, BAD))]))
    check = quality.check

    def fail_narrow(*arguments: Any) -> Report:
        report = check(*arguments)
        checks = tuple(replace(one, success=False, detail="planted") if one.sae == NARROW else one for one in report.checks)
        return replace(report, checks=checks)

    monkeypatch.setattr(quality, "check", fail_narrow)
    people = {"labellers": [*params.label.model_dump(mode="json")["labellers"], {"kind": "human", "path": "labels.csv"}]}
    heard: list[Event] = []
    section = type(params.label).model_validate(params.label.model_dump(mode="json") | people)
    made = run_stage("label", params.model_copy(update={"label": section}), heard.append)
    assert made.children == [GOOD] and list(made.rejected) == [NARROW] and set(made.leaving_out(()).children) == {GOOD, NARROW}
    left_out = [event.what for event in heard if isinstance(event, Warned) and " is left out because " in event.what]
    assert len(left_out) == 2


def test_the_catalogue_holds_the_saes_that_passed_every_gate_and_can_be_promoted(params: Params) -> None:
    heard: list[Event] = []
    run_stage("intervene", params, ignore)
    run_stage("catalog", params, heard.append)
    assert len([event for event in heard if isinstance(event, Warned) and " is left out because " in event.what]) == 3
    (passed,) = (sae.summary["sae"] for name, sae in open_stage("train").each().items() if name == GOOD)
    with Catalog(Path("data/catalog/catalog.duckdb")) as catalog:
        assert catalog.rows("SELECT name FROM runs") == [(GOOD,)]
        for relation in ("latents", "features", "neighbours", "firings", "examples", "labels", "comparisons"):
            assert catalog.rows(f"SELECT DISTINCT sae FROM {relation}") == [(passed,)]
        assert catalog.rows("SELECT * FROM matches") == catalog.rows("SELECT * FROM stability") == []
    assert open_stage("evaluate").rows("stability") == 6  # it was matched with two that were rejected later
    assert run("show", "--compare") == run("show") == 0
    decision = champion.decide(params)
    assert decision.challenger.sae == passed


def test_an_sae_that_passes_the_next_time_has_a_finished_run(params: Params) -> None:
    made = run_stage("evaluate", params, ignore)
    assert set(made.children) == {GOOD, WIDE, NARROW} and not made.rejected
    logged = runs_of_training()[WIDE]
    assert logged.info.status == "FINISHED" and "ommatid.rejected.evaluate" not in logged.data.tags


@pytest.mark.parametrize("runs", [[RUNS[1]], [RUNS[1], {**RUNS[1], "seed": 1}]], ids=["the only one", "all"])
def test_nothing_is_published_if_no_sae_passes(runs: list[dict[str, Any]], params: Params) -> None:
    before = open_stage("train").digest
    with pytest.raises(GateError, match=r"the final FVU is below 1: .*; nothing was published; the report is ") as failed:
        run_stage("train", changed(params, runs=runs), ignore)
    assert str(failed.value).count("the final FVU is below 1") == len(runs)
    assert open_stage("train").digest == before and not list(Path("data/.work").glob("sae-*"))


def test_an_sae_that_diverges_is_rejected_and_the_others_continue(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    learn, bad = Learner.learn, "batch_topk-20-k2-s0"

    def diverge(self: Learner, batch: Batch) -> None:
        if self.name == bad and self.guides.step == 7:
            raise TrainingError("the loss is nan")
        learn(self, batch)

    monkeypatch.setattr(Learner, "learn", diverge)
    made = run_stage("train", changed(params, runs=[RUNS[0], {"d_sae": 20, "k": 2}]), ignore)
    assert made.children == [GOOD] and list(made.rejected) == [bad]
    assert made.rejected[bad].startswith("the final FVU is a number: step 7: ")
