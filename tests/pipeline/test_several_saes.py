"""Proves that the SAEs of a training go through every stage side by side, with their own width and k, and that a kill costs at most one.

Drawn tiles and the model that sees their colours: by `run_stage` with the real gates and a real MLflow store. The tests of this file
run in order: each needs the artefacts of the one before.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient
from PIL import Image

from ommatid.activations.columns import from_float16
from ommatid.catalog.reader import Catalog
from ommatid.config import Params, RetrainParams, make_params
from ommatid.errors import ArtefactError, GateError
from ommatid.evaluate.stage import evaluate
from ommatid.events import Event, Listener, Progress, Reused, Warned, ignore
from ommatid.metrics import Fidelity
from ommatid.pipeline import STAGES, open_stage
from ommatid.pipeline.run import run_stage
from ommatid.publish import champion
from ommatid.sae.model import SAE, SAEConfig
from ommatid.store import Artefact, open_draft
from ommatid.store.per_sae import numbers
from support.study import run_verb
from support.tiles import D_DEEP, DeepTileModel, TileModel, deep_tile_checkout

NARROW, WIDE = "batch_topk-12-k2-s0", "batch_topk-24-k3-s0"
WIDTHS = {NARROW: 12, WIDE: 24}
ABOUT_LATENTS = {"evaluate": "latents", "label": "labels", "intervene": "effects"}
"""A table with a row for every latent, by stage."""
CATALOG = Path("data/catalog/catalog.duckdb")


@pytest.fixture(scope="module", autouse=True)
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeepTileModel]:
    """The model, in a folder with pictures and params.yaml."""
    train = {"hookpoint": "tiles", "epochs": 40, "batch_size": 64, "lr": 0.01, "max_dead": 1.0, "d_sae": 24, "k": 3}
    with deep_tile_checkout(tmp_path_factory.mktemp("checkout"), 200, train=train | {"runs": [{"d_sae": 12, "k": 2}, {}]}) as model:
        yield model


@pytest.fixture
def params() -> Params:
    return make_params(yaml.safe_load(Path("params.yaml").read_text()), "params.yaml")


class Killed(BaseException):
    """Stands for a signal that ends a stage between two files."""


def kill_at(wanted: Callable[[Event], bool]) -> Listener:
    def listen(event: Event) -> None:
        if wanted(event):
            raise Killed

    return listen


def is_about(sae: str, event: Event) -> bool:
    if isinstance(event, Progress):
        return event.what.startswith(f"{sae}: ")
    return not isinstance(event, Warned | Reused) and event.sae == sae


def test_progress_names_the_sae(capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("images", "extract", "train"):
        assert run_verb(stage) == 0
    said = capsys.readouterr().out
    assert "train steps: " in said
    assert all(f"{name}: step " in said for name in WIDTHS)
    assert "train: data/sae holds 2 SAEs, 200 curves" in said
    training = open_stage("train")
    assert training.summary["saes"] == [NARROW, WIDE] == list(training.each())
    assert {name: SAE.load(sae.path).config.d_sae for name, sae in training.each().items()} == WIDTHS


@pytest.mark.parametrize("stage", ["evaluate", "label", "intervene"])
def test_a_stage_killed_between_two_saes_continues_with_the_second(stage: str, params: Params) -> None:
    with pytest.raises(Killed):
        run_stage(stage, params, kill_at(lambda event: is_about(WIDE, event)))
    assert not STAGES[stage].place.exists()
    heard: list[Event] = []
    made = run_stage(stage, params, heard.append)
    assert not [event for event in heard if is_about(NARROW, event)] and [event for event in heard if is_about(WIDE, event)]
    assert list(made.each()) == [NARROW, WIDE]
    for name, child in made.each().items():
        assert len(set(child.read(ABOUT_LATENTS[stage], ["latent"])["latent"].to_pylist())) == WIDTHS[name]
        assert made.summary["of"][name] == numbers(child.summary)
        assert child.manifest.inputs["train"] == open_stage("train").each()[name].digest
    made.verify()


def test_the_catalogue_holds_both_and_the_gates_passed(params: Params) -> None:
    run_stage("catalog", params, ignore)
    with Catalog(CATALOG) as catalog:
        assert dict(catalog.rows("SELECT name, n_latents FROM runs")) == WIDTHS
        for relation in ("latents", "features", "neighbours", "firings", "examples", "labels", "comparisons"):
            per_sae = catalog.rows(f"SELECT name, count(*) FROM {relation} JOIN runs USING (sae) GROUP BY name")
            assert {name for name, _ in per_sae} == set(WIDTHS)
        assert catalog.rows("SELECT count(*) FROM features") == [(36,)]
        assert catalog.rows("SELECT name, count(*) FROM matches JOIN runs USING (sae) GROUP BY name ORDER BY name") == sorted(
            WIDTHS.items()
        )
        # each has a row for each other: the share of a narrow one's latents is over its own
        shares = catalog.rows("SELECT name, round(matched * n_latents) FROM stability JOIN runs USING (sae)")
        assert len(shares) == 2 and len({matched for _, matched in shares}) == 1
        # the same images, the same neurons: what does not depend on the SAE is the same beside each
        assert len(set(catalog.rows("SELECT ms, ms_floor FROM comparisons WHERE dictionary = 'neurons'"))) == 1
        runs = {row["name"]: row for row in catalog.ask("FROM runs").dicts()}
    client = MlflowClient(f"sqlite:///{Path.cwd()}/.mlflow/mlflow.db")
    page = Path("data/quality/report.html").read_text(encoding="utf-8")
    assert all(f"<td>{name}</td>" in page for name in WIDTHS)
    for name, row in runs.items():
        logged = [file.path for file in client.list_artifacts(row["mlflow_run_id"], "quality")]
        assert {"quality/report.html", "quality/catalog.html"} <= set(logged)
        found = client.get_run(row["mlflow_run_id"])
        assert found.info.run_name == name
        assert found.data.metrics["evaluate.fvu"] == pytest.approx(row["fvu"])
        assert found.data.metrics["label.n_latents"] == WIDTHS[name]
    assert len({client.get_run(row["mlflow_run_id"]).data.tags["ommatid.training"] for row in runs.values()}) == 1


def test_show_takes_an_sae_and_compares_all(capsys: pytest.CaptureFixture[str]) -> None:
    pictures = []
    for arguments in (["3"], ["3", "--sae", NARROW], ["3", "--sae", WIDE], ["--sae", NARROW], ["--compare"]):
        assert run_verb("show", *arguments) == 0
        pictures.append(Path(capsys.readouterr().out.strip()).read_bytes())
    assert pictures[1] != pictures[2]
    assert pictures[0] in pictures[1:3]
    with Image.open("data/pictures/comparison.png") as picture:
        assert picture.width == 1240
    assert run_verb("show", "3", "--sae", "batch_topk-12-k2-s1") == 1
    assert f"did you mean {NARROW}? the catalogue has " in capsys.readouterr().err
    assert run_verb("show", "20", "--sae", NARROW) == 1
    assert "has 0 to 11" in capsys.readouterr().err
    assert run_verb("show", "3", "--compare") == 1


def test_inputs_that_do_not_belong_together_are_refused(params: Params) -> None:
    shutil.copytree("data", "other")
    again = params.train.model_copy(update={"seed": 1, "epochs": 1, "runs": (), "max_dead": 1.0})
    run_stage("train", params.model_copy(update={"train": again}), ignore, "other")
    with pytest.raises(ArtefactError) as refused:
        run_stage("catalog", params, ignore, "other")
    assert "other/evaluation was made from another version of other/sae" in str(refused.value)
    assert "other/labels was made from another version of other/sae" in str(refused.value)
    assert "in this order: evaluate, label, intervene, catalog" in str(refused.value)


def test_a_gate_names_the_sae_that_fails_and_nothing_is_published(params: Params) -> None:
    before = open_stage("train").digest
    lazy = {"variant": "relu", "d_sae": 32, "k": 1, "lr": 1e-9}  # half of its latents fire, where the encoder is made for one
    values = params.train.model_dump(mode="json") | {"runs": [{}, lazy], "epochs": 1, "max_dead": 1e-9}
    with pytest.raises(GateError, match="relu-32-k1-s0: ") as failed:
        run_stage("train", params.model_copy(update={"train": type(params.train).model_validate(values)}), ignore)
    assert "quality/train.html" in str(failed.value)
    assert open_stage("train").digest == before


# transcoders


def test_a_transcoder_is_measured_by_what_it_decodes(model: DeepTileModel, params: Params, tmp_path: Path) -> None:
    red, green, blue = model.spread
    directions = torch.stack([red, green, blue])
    decoded = directions @ model.onward
    config = SAEConfig("planted", TileModel.d_model, 3, 2, "tiles", "tiles", target="deep")
    sae = SAE(config, directions.T.contiguous(), torch.zeros(3), decoded, torch.zeros(D_DEEP), torch.tensor(0.1))
    with open_draft(tmp_path / "sae", "sae", {}, {}) as draft:
        with draft.write_file("sae.safetensors") as weights, draft.write_file("cfg.json") as cfg:
            sae.save(weights, cfg)
        draft.seal({"sae": "planted", "dead_latents": []})
        transcoder = draft.publish(tmp_path / "sae")
    inputs = {"images": open_stage("images"), "extract": activations("tiles"), "target": activations("deep"), "train": transcoder}
    with open_draft(tmp_path / "evaluation", "evaluation", {}, inputs) as draft:
        evaluate(params.evaluate, inputs, draft)
        evaluation = draft.publish(tmp_path / "evaluation")
    found = {row["dictionary"]: row for row in evaluation.read("comparisons").to_pylist()}
    expected = Fidelity()
    acts = sae.encode(eval_rows("tiles"))
    expected.add(eval_rows("deep"), sae.decode(acts), int((acts > 0).sum()))
    assert found["sae"]["fvu"] == pytest.approx(expected.fvu, rel=1e-6)
    assert found["sae"]["cosine"] == pytest.approx(expected.cosine, rel=1e-6)
    assert found["untrained"]["fvu"] is None and found["untrained"]["cosine"] is None
    assert found["neurons"]["n_latents"] == TileModel.d_model
    spliced = {row["spliced"]: row["accuracy"] for row in evaluation.read("zero_shot").to_pylist()}
    assert list(spliced) == ["plain", "sae", "sae_with_error", "mean"]  # what is untrained decodes nothing else than it encodes
    assert spliced["sae"] == spliced["plain"] == 1.0 > spliced["mean"]


def activations(hookpoint: str) -> Artefact:
    return open_stage("extract", hookpoint)


def eval_rows(hookpoint: str) -> torch.Tensor:
    return from_float16(activations(hookpoint).read("eval")["x"]).float()


def test_a_target_with_other_tokens_is_refused(params: Params) -> None:
    train = params.train.model_copy(update={"target": "cls"})
    with pytest.raises(ArtefactError, match=r"train.target: cls cannot be reconstructed from tiles, .*tokens_per_image 7 and 1"):
        run_stage("train", params.model_copy(update={"train": train}), ignore)


def test_evaluating_a_transcoder_needs_its_target(params: Params, tmp_path: Path) -> None:
    inputs = {"images": open_stage("images"), "extract": activations("tiles"), "target": activations("deep")}
    inputs["train"] = open_stage("train").each()[NARROW]
    with (
        pytest.raises(ArtefactError, match=r"evaluate: the SAE was trained to decode tiles, but train.target says deep"),
        open_draft(tmp_path / "evaluation", "evaluation", {}, inputs) as draft,
    ):
        evaluate(params.evaluate, inputs, draft)


# a retrain


def test_a_new_champion_is_matched_with_the_last_on_the_same_images(params: Params) -> None:
    champion.publish(champion.decide(params), params.retrain.keep)
    with Catalog(champion.CATALOG) as catalog:
        ((before,),) = catalog.rows("SELECT sae FROM runs WHERE decision = 'champion'")
    train = type(params.train).model_validate(params.train.model_dump(mode="json") | {"runs": [], "seed": 1})
    margins = RetrainParams(min_ms_gain=-1, max_fvu_loss=1, max_dead_rise=1)
    again = params.model_copy(update={"train": train, "retrain": margins})
    for stage in ("train", "evaluate", "label", "intervene", "catalog"):
        run_stage(stage, again, ignore)
    decision = champion.decide(again)
    assert decision.decision == "champion" and decision.champion and decision.champion.sae == before
    champion.publish(decision, again.retrain.keep)
    with Catalog(champion.CATALOG) as catalog:
        found = catalog.ask("FROM matches WHERE sae = $sae", {"sae": decision.challenger.sae}).dicts()
        assert [row["latent"] for row in found] == list(range(24)) and {row["other_sae"] for row in found} == {before}
        assert all(row["jaccard"] is None or 0 <= row["jaccard"] <= 1 for row in found)
        assert any(row["jaccard"] for row in found)
        assert catalog.rows("SELECT sae, other_sae FROM stability ORDER BY sae = ?", [before]) == [
            (decision.challenger.sae, before),
            (before, decision.challenger.sae),
        ]
