"""Proves that a study under another root than the checkout's keeps its reports, params and provenance to itself."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from ommatid import quality
from ommatid.config import load_params
from ommatid.events import Event, Warned
from ommatid.pipeline import open_stage
from ommatid.pipeline.inputs import study_params
from support.activations import draw_activations
from support.study import make_test_params, run_verb


@pytest.fixture(scope="module", autouse=True)
def _checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A checkout with a main study and another one with other values, each run up to the training."""
    root = tmp_path_factory.mktemp("checkout")
    np.save(root / "x.npy", draw_activations()[:2000])
    values = make_test_params(train={"d_sae": 48, "k": 4, "epochs": 2, "batch_size": 256, "max_dead": 1.0}).model_dump(mode="json")
    values["extract"] = {"source": "files", "path": str(root / "x.npy"), "name": "planted", "model": "drawn"}
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    (root / "dvc.lock").write_text("stages: {}\n")
    patch = pytest.MonkeyPatch()
    patch.chdir(root)
    assert run_verb("extract") == run_verb("train") == 0
    assert run_verb("extract", "--data", "other/study", "--set", "extract.name=another", "--set", "extract.eval_share=0.4") == 0
    yield
    patch.undo()


def test_reports_belong_to_their_study(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in Path("data/quality").rglob("*") if path.is_file()}
    assert {path.name for path in before} >= {"extract.json", "extract.html", "train.json", "train.html"}
    assert run_verb("train", "--data", "other/study", "--set", "train.k=3") == 0
    assert {path: path.read_bytes() for path in Path("data/quality").rglob("*") if path.is_file()} == before
    there = {path.relative_to("other/study/quality").as_posix() for path in Path("other/study/quality").rglob("*") if path.is_file()}
    assert {"extract.json", "extract.html", "train.json", "train.html"} <= there and any(name.startswith("health/") for name in there)

    capsys.readouterr()
    failed = quality.Report("train", (quality.Check("is good", "or it is not", False, "bad", "it is bad"),), {})
    monkeypatch.setattr(quality, "check", lambda *_: failed)
    assert run_verb("train", "--data", "other/study", "--set", "train.k=2") == 1
    report = Path("other/study/quality/train.html").absolute()
    assert f"nothing was published; the report is {report}\n" in capsys.readouterr().err and report.is_file()


def test_a_stage_uses_the_params_that_the_study_was_made_with_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("train", "--data", "other/study") == 0  # its hookpoint is another than params.yaml's
    said = capsys.readouterr().out
    assert "notice: other/study was made with extract.name=another, extract.eval_share=0.4: train uses these values" in said
    assert open_stage("train", data="other/study").manifest.params["k"] == 4  # its own section is as given

    params, heard = load_params(), list[Event]()
    studied = study_params("train", params, "other/study", heard.append)
    assert studied.read_and_decoded == (("another", None),) and studied.train == params.train
    assert [type(event) for event in heard] == [Warned]
    assert study_params("train", params, "data") is params
    assert study_params("train", params, "./data/") is params
    assert study_params("train", params, "nowhere") is params
    same = load_params(overrides=["extract.name=another", "extract.eval_share=0.4"])
    heard.clear()
    assert study_params("train", same, "other/study", heard.append) == same and not heard


def test_a_study_under_another_root_records_no_dvc_lock() -> None:
    client = MlflowClient(f"sqlite:///{Path('.mlflow/mlflow.db').absolute()}")
    digests = {data: next(iter(open_stage("train", data=data).each().values())).digest for data in ("data", "other/study")}
    runs = {run.data.tags.get("ommatid.sae"): run.data.tags for run in client.search_runs(["1"])}
    assert len(runs[digests["data"]]["dvc.lock"]) == 64
    assert "dvc.lock" not in runs[digests["other/study"]]


def test_queries_pictures_and_reports_of_a_study_stay_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from support import catalog as catalog_artefacts

    catalog_artefacts.build(tmp_path / "made", catalog_artefacts.make_inputs(tmp_path / "made"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study/catalog").mkdir(parents=True)
    shutil.copyfile(catalog_artefacts.path_in(tmp_path / "made"), "study/catalog/catalog.duckdb")
    assert run_verb("query", "SELECT count(*) AS n FROM runs", "--format", "csv", "--data", "study") == 0
    assert capsys.readouterr().out == "n\n1\n"
    for arguments in (("--data", "study"), ("--catalog", "study/catalog/catalog.duckdb")):
        assert run_verb("report", *arguments) == 0 and run_verb("show", *arguments) == 0
        assert capsys.readouterr().out.split() == ["study/report.html", "study/pictures/best.png"]
    assert not Path("data").exists()
    assert run_verb("query", "SELECT 1", "--data", "study", "--catalog", "study/catalog/catalog.duckdb") == 1
    assert "name the catalogue by one of them" in capsys.readouterr().err
    for data in ("nowhere", "study/none"):
        assert run_verb("query", "SELECT 1", "--data", data) == 1
        assert f"{data}/catalog/catalog.duckdb: does not exist" in capsys.readouterr().err


def test_an_sae_of_a_study_is_exported_from_it(capsys: pytest.CaptureFixture[str]) -> None:
    saes = list(open_stage("train", data="other/study").each())
    assert run_verb("export", "--to", "saelens", "--out", "out", "--sae", f"other/study/sae/{saes[0]}") == 0
    assert len(saes) == 1 and run_verb("export", "--to", "saelens", "--out", "same", "--data", "other/study") == 0
    assert all(path.read_bytes() == Path("out", path.name).read_bytes() for path in Path("same").iterdir())
    shutil.copytree("other/study/activations", "two/activations")
    assert run_verb("train", "--data", "two", "--set", "train.runs=[{k: 2}, {k: 3}]") == 0
    capsys.readouterr()
    assert run_verb("export", "--to", "saelens", "--out", "again", "--data", "two") == 1
    assert "two/sae holds 2 SAEs" in (said := capsys.readouterr().err) and "name the folder of one with --sae" in said
    assert run_verb("export", "--to", "saelens", "--out", "again", "--data", "nowhere") == 1
    assert "nowhere/sae" in capsys.readouterr().err
