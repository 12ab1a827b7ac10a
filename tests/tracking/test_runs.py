"""Tracking records training and never stops it, with a real store on SQLite and servers that refuse, hang or die."""

import json
import logging
import os
import shutil
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run as MlflowRun

from ommatid import store, tracking
from ommatid.config import Params, TrainParams, dotted, load_params
from ommatid.errors import RunError, StoppedError, TrainingError
from ommatid.events import Event, Listener, Measured, Noticed, Progress, Warned, ignore
from ommatid.publish import champion
from ommatid.publish.decisions import Decision, Scores
from ommatid.sae.model import SAE, SAEConfig
from ommatid.store import Artefact
from ommatid.tracking import runs
from ommatid.tracking.provenance import TAGS
from support.processes import HANG_SECONDS, wait_for
from support.study import CHECKOUT

D_MODEL, D_SAE = 4, 6


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(CHECKOUT / "params.yaml", ["train.d_sae=12", "train.k=2"])


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A store with empty tables, which is copied because making the tables takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path.read_bytes()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: bytes) -> Path:
    """A git checkout as current directory, with an empty store at the default place."""
    for variable in ("MLFLOW_TRACKING_URI", "OMMATID_CHECKOUT", "OMMATID_EXPERIMENT", "OMMATID_FLOW_RUN", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").write_text("1\n")
    (tmp_path / "dvc.lock").write_text("stages: {}\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "Begin"]):
        subprocess.run(["git", *command], check=True)
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow/mlflow.db").write_bytes(empty_database)
    return tmp_path


@pytest.fixture
def client(checkout: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{checkout}/.mlflow/mlflow.db")


def make_activations() -> Artefact:
    with store.open_draft(Path("data/activations"), "activations", {}, {}) as draft:
        draft.seal({})
        return draft.publish(Path("data/activations"))


def make_training(params: Params, seed: int = 0) -> Artefact:
    """Make the artefact of the stage `train` for some params."""
    with store.open_draft(Path("data/sae"), "training", {"seed": seed}, {}) as draft:
        for i, (name, one) in enumerate(params.train.each().items()):
            child = draft.child(name, "sae", {**one.identity(), "seed": seed})
            with child.write_file("sae.safetensors") as weights, child.write_file("cfg.json") as config:
                tiny_sae(seed + i).save(weights, config)
            child.seal({"sae": f"{name}-12345678"})
        draft.seal({})
        return draft.publish(Path("data/sae"))


def only_sae(training: Artefact) -> Artefact:
    (sae,) = training.each().values()
    return sae


def tiny_sae(seed: int) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    w_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL, generator=generator), dim=1)
    config = SAEConfig("batch_topk", D_MODEL, D_SAE, 2, "blocks.15", "lite0")
    return SAE(config, w_dec.T.contiguous(), torch.zeros(D_SAE), w_dec, torch.zeros(D_MODEL), torch.tensor(0.1))


ONE = "batch_topk-12-k2-s0"
"""The SAE of `params`."""


def curves(listener: Listener, n: int, sae: str = ONE, factor: float = 1.0) -> None:
    for step in range(1, n + 1):
        listener(Progress("train", step, n))
        listener(Measured(sae, step, {"loss": factor / step, "fvu": 0.5 - step / 1e4}))


def all_runs(client: MlflowClient) -> list[MlflowRun]:
    experiment = client.get_experiment_by_name("ommatid")
    assert experiment is not None
    return client.search_runs([experiment.experiment_id])


def only_run(client: MlflowClient) -> MlflowRun:
    (run,) = all_runs(client)
    return run


def test_run_holds_params_curves_origin_and_inputs(
    checkout: Path, client: MlflowClient, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMMATID_EXPERIMENT", "wide")
    monkeypatch.setenv("OMMATID_FLOW_RUN", "flow-1")
    (checkout / "dvc.lock").write_text("stages: {images: {}}\n")  # the result of a stage, not a change of code
    activations, heard = make_activations(), []
    with tracking.training_runs(params, {"extract": activations}) as run:
        curves(run.tee(heard.append), 1500)
    assert len(heard) == 3000, "the listener hears every event"
    found = only_run(client)
    assert found.info.status == "FINISHED"
    assert found.data.params == {key: value if isinstance(value, str) else json.dumps(value) for key, value in dotted(params).items()}
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / step) for step in range(1, 1501)]
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    expected = {
        "mlflow.source.git.commit": head,
        "git.dirty": "false",
        "dvc.experiment": "wide",
        "prefect.flow_run": "flow-1",
        "ommatid.input.extract": activations.digest,
    }
    assert found.data.tags.items() >= expected.items()
    assert found.info.run_name == "wide"
    assert found.inputs is not None
    assert [entry.dataset.digest for entry in found.inputs.dataset_inputs] == [activations.digest[:32]]


def test_changed_code_is_recorded_as_dirty(checkout: Path, client: MlflowClient, params: Params) -> None:
    (checkout / "code.py").write_text("2\n")
    with tracking.training_runs(params, {}):
        pass
    assert only_run(client).data.tags["git.dirty"] == "true"


def test_model_is_registered_and_loads_without_pickle(client: MlflowClient, params: Params) -> None:
    training = make_training(params)
    sae = only_sae(training)
    with tracking.training_runs(params, {}) as run:
        run.finish(training)
    version = tracking.find_version(sae.digest)
    assert version == tracking.Version(1, sae.digest, only_run(client).info.run_id)
    files = {path.name for path in Path(".mlflow/artifacts").rglob("*") if path.is_file()}
    assert files == {"MLmodel", "requirements.txt", "sae.safetensors", "cfg.json"}
    model = mlflow.pyfunc.load_model(client.get_model_version_download_uri(tracking.MODEL, "1"))
    x = np.random.default_rng(0).standard_normal((5, D_MODEL)).astype(np.float32)
    np.testing.assert_array_equal(model.predict(x), tiny_sae(0).encode(torch.from_numpy(x)).numpy())


def test_champion_is_set_read_and_moved(params: Params, checkout: Path) -> None:
    assert tracking.get_champion() is None
    saes = [only_sae(make_training(params, seed)) for seed in (0, 1)]
    with pytest.raises(RunError, match=f"holds no version of the SAE {saes[0].digest[:12]}"):
        tracking.set_champion(saes[0].digest)
    for seed, sae in enumerate(saes):
        with tracking.training_runs(params, {}) as run:
            run.finish(make_training(params, seed))
        assert tracking.set_champion(sae.digest).number == seed + 1
        assert tracking.get_champion() == tracking.find_version(sae.digest)
    assert tracking.set_champion(saes[0].digest).number == 1


def test_a_champion_trained_without_the_registry_registers_itself_later(
    params: Params, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = only_sae(make_training(params))
    scores = Scores(sae="a", digest=sae.digest, fvu=0.3, l0=2.0, dead=0.1, ms=0.4, ms_floor=0.3)
    row = {"sae": "a", "git_commit": "abc", "git_dirty": False, "dvc_lock": "def", "prefect_flow_run_id": "123", "dvc_experiment": None}
    values = {
        "decision": "champion",
        "reason": "there was no champion",
        "decided_at": "2026-01-01T00:00:00Z",
        "catalog": "c" * 64,
        "run": row,
    }
    made = Decision.model_validate(values | {"challenger": scores, "champion": None, "margins": params.retrain.margins})
    shutil.copytree(sae.path, champion.folder_of(made) / "sae")
    champion.append(made)
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
        warned: list[Event] = []
        assert champion.try_alias(warned.append) is None
        (warning,) = warned
        assert isinstance(warning, Warned) and "the alias champion was not set" in warning.what and "tries again" in warning.what
    shutil.rmtree("data/sae")  # by a later training
    moved = champion.try_alias(warned.append)
    assert moved and moved.endswith(f"version 1, a, which was registered from {champion.folder_of(made)}") and len(warned) == 1
    version = tracking.get_champion()
    assert version and version.sae == sae.digest
    run = client.get_run(str(version.run_id))
    assert run.info.status == "FINISHED" and run.data.tags["ommatid.sae"] == sae.digest
    of_run = {column: run.data.tags.get(tag) for column, tag in TAGS.items()}
    assert of_run == {**{column: row[column] for column in TAGS}, "git_dirty": "false"}
    assert champion.try_alias(warned.append) is None and len(client.search_model_versions(f"name = '{tracking.MODEL}'")) == 1


def test_lineage_is_that_of_the_training_run(checkout: Path, client: MlflowClient, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    training = make_training(params)
    monkeypatch.setenv("OMMATID_EXPERIMENT", "wide")
    with tracking.training_runs(params, {}) as run:
        run.finish(training)
    monkeypatch.setenv("OMMATID_EXPERIMENT", "another")
    found = tracking.lineage(training.each())[ONE]
    assert found["mlflow_run_id"] == only_run(client).info.run_id
    assert found["dvc_experiment"] == "wide"
    assert found["git_dirty"] == "false"
    assert found["prefect_flow_run_id"] is None


@pytest.mark.parametrize(
    ("explorer", "experiment", "address"),
    [("http://127.0.0.1:8321", "", "http://127.0.0.1:8321/?sae={}"), ("http://127.0.0.1:8321", "wide", None), ("", "", None)],
)
def test_an_explorer_of_the_checkout_is_linked(
    explorer: str, experiment: str, address: str | None, client: MlflowClient, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMMATID_EXPLORER_URL", explorer)
    monkeypatch.setenv("OMMATID_EXPERIMENT", experiment)
    training = make_training(params)
    with tracking.training_runs(params, {}) as run:
        run.finish(training)
    assert only_run(client).data.tags.get("explorer") == (address and address.format(f"{ONE}-12345678"))


def test_files_follow_a_checkout_that_was_moved(
    checkout: Path, params: Params, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    training = make_training(params)
    with tracking.training_runs(params, {}) as run:
        run.finish(training)
    moved = tmp_path_factory.mktemp("else where") / "moved's"  # what must be escaped in a URL, and in SQL
    shutil.move(checkout, moved)
    monkeypatch.chdir(moved)
    Path("evaluate.json").write_text("{}")
    tracking.log_stage("evaluate", training.each(), [Path("evaluate.json")], {ONE: {"fvu": 0.5}})
    assert not checkout.exists()
    client = MlflowClient(f"sqlite:///{moved}/.mlflow/mlflow.db")
    made = only_run(client)
    assert made.info.artifact_uri and made.info.artifact_uri.startswith((moved / ".mlflow/artifacts").as_uri())
    assert (moved / ".mlflow/artifacts" / made.info.run_id / "artifacts/quality/evaluate.json").exists()
    version = client.get_model_version("ommatid-sae", "1")
    assert Path(download_artifacts(version.source, tracking_uri=client.tracking_uri)).is_relative_to(moved)

    copied = moved.with_name("copied")
    shutil.copytree(moved, copied)
    tracking.follow_move(copied / ".mlflow")
    tracking.follow_move(copied / ".mlflow")
    with closing(sqlite3.connect(copied / ".mlflow/mlflow.db")) as connection:
        (uri,) = connection.execute("SELECT artifact_uri FROM runs").fetchone()
    assert uri == made.info.artifact_uri.replace(moved.as_uri(), copied.as_uri())
    tracking.follow_move(copied / "nothing")
    assert not (copied / "nothing").exists()


def test_a_study_outside_dvc_records_no_dvc_lock(checkout: Path, client: MlflowClient, params: Params) -> None:
    with tracking.training_runs(params, {}, is_versioned=False):
        pass
    assert "dvc.lock" not in only_run(client).data.tags and len(only_run(client).data.tags["mlflow.source.git.commit"]) == 40
    (checkout / ".mlflow/mlflow.db").unlink()
    assert tracking.lineage(make_training(params).each(), is_versioned=False)[ONE]["dvc_lock"] is None


def test_lineage_without_a_run_is_the_current_commit(checkout: Path, params: Params) -> None:
    (checkout / ".mlflow/mlflow.db").unlink()
    found = tracking.lineage(make_training(params).each())[ONE]
    assert found["mlflow_run_id"] is None
    assert len(found["git_commit"] or "") == 40
    assert not (checkout / ".mlflow/mlflow.db").exists(), "asking makes no store"


def test_later_stages_add_numbers_and_reports(checkout: Path, client: MlflowClient, params: Params) -> None:
    training = make_training(params)
    with tracking.training_runs(params, {}) as run:
        run.finish(training)
    report = checkout / "evaluate.html"
    report.write_text("<p>")
    tracking.log_stage("evaluate", training.each(), [report], {ONE: {"fvu": 0.25, "n": 3}})
    found = only_run(client)
    assert found.data.metrics.items() >= {"evaluate.fvu": 0.25, "evaluate.n": 3.0}.items()
    assert [file.path for file in client.list_artifacts(found.info.run_id, "quality")] == ["quality/evaluate.html"]


def test_each_sae_of_a_training_has_its_own_run(
    checkout: Path, client: MlflowClient, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = TrainParams.model_validate(params.train.model_dump() | {"runs": [{"k": 8}, {"k": 32, "d_sae": 512}]})
    params = params.model_copy(update={"train": train})
    narrow, wide = train.each()
    monkeypatch.setenv("OMMATID_EXPERIMENT", "both")
    training = make_training(params)
    with tracking.training_runs(params, {}) as run:
        listener = run.tee(ignore)
        curves(listener, 3, narrow)
        curves(listener, 5, wide, factor=2.0)
        run.finish(training)
    found = {run.info.run_name: run for run in all_runs(client)}
    assert found.keys() == {narrow, wide}
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    assert len({run.data.tags[runs.TRAINING] for run in found.values()}) == 1
    assert [run.data.params["train.k"] for run in (found[narrow], found[wide])] == ["8", "32"]
    for name, n, last in ((narrow, 3, 1 / 3), (wide, 5, 2 / 5)):
        history = client.get_metric_history(found[name].info.run_id, "loss")
        assert (len(history), history[-1].value) == (n, last)
        version = tracking.find_version(training.each()[name].digest)
        assert version is not None and version.run_id == found[name].info.run_id
    tracking.log_stage("evaluate", training.each(), [], {narrow: {"fvu": 0.4}, wide: {"fvu": 0.2}})
    of_stage = {run.info.run_name: run.data.metrics["evaluate.fvu"] for run in all_runs(client)}
    assert of_stage == {narrow: 0.4, wide: 0.2}
    lineage = tracking.lineage(training.each())
    assert {name: of["mlflow_run_id"] for name, of in lineage.items()} == {name: run.info.run_id for name, run in found.items()}


def test_notices_become_the_description_of_the_run(checkout: Path, client: MlflowClient, params: Params) -> None:
    with tracking.training_runs(params, {}) as run:
        listener = run.tee(ignore)
        curves(listener, 2)
        listener(Noticed(ONE, 40, "no progress: FVU has not fallen"))
        listener(Noticed(ONE, 60, "training ends at step 80"))
    assert only_run(client).data.tags[runs.NOTE] == "Step 40: no progress: FVU has not fallen\n\nStep 60: training ends at step 80"


def test_histograms_are_a_table_with_a_row_for_each_bin(checkout: Path, client: MlflowClient, params: Params) -> None:
    with tracking.training_runs(params, {}) as run:
        for step in (10, 20):
            run.tee(ignore)(Measured(ONE, step, {"fvu": 0.5}, {"log10_density": ([-3.0, -2.0, -1.0], [step, 2])}))
    path = client.download_artifacts(only_run(client).info.run_id, runs.HISTOGRAMS)
    assert json.loads(Path(path).read_text()) == {
        "columns": ["step", "histogram", "low", "high", "latents"],
        "data": [
            [10, "log10_density", -3.0, -2.0, 10],
            [10, "log10_density", -2.0, -1.0, 2],
            [20, "log10_density", -3.0, -2.0, 20],
            [20, "log10_density", -2.0, -1.0, 2],
        ],
    }


def test_the_table_of_histograms_is_written_during_training(
    checkout: Path, client: MlflowClient, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.1)
    monkeypatch.setattr(runs, "TABLE_SECONDS", 0.0)
    with tracking.training_runs(params, {}) as run:
        run.tee(ignore)(Measured(ONE, 10, {"fvu": 0.5}, {"encoder_norm": ([0.0, 1.0], [6])}))
        wait_for(lambda: client.get_experiment_by_name("ommatid") and all_runs(client) and "fvu" in only_run(client).data.metrics, "points")
        wait_for(lambda: client.list_artifacts(only_run(client).info.run_id), "the table")


def test_the_training_thread_only_queues_events(
    checkout: Path, client: MlflowClient, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of the MLflow client between start and end is made on the other thread, so an event costs one append to a queue."""
    callers: list[str] = []

    def spied(name: str) -> Callable[..., object]:
        original = getattr(MlflowClient, name)

        def call(self: MlflowClient, *arguments: object, **named: object) -> object:
            callers.append(threading.current_thread().name)
            return original(self, *arguments, **named)

        return call

    for name in ("log_batch", "log_text", "set_tag", "create_run", "search_runs", "log_inputs", "get_experiment_by_name"):
        monkeypatch.setattr(MlflowClient, name, spied(name))
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.05)
    monkeypatch.setattr(runs, "TABLE_SECONDS", 0.1)
    appended: list[Event] = []
    with tracking.training_runs(params, {}) as run:
        listener = run.tee(appended.append)
        for step in range(1, 21):
            listener(Measured(ONE, step, {"fvu": 0.5}, {"encoder_norm": ([0.0, 1.0], [6])}))
            listener(Noticed(ONE, step, "something"))
            time.sleep(0.05)
        wait_for(lambda: len(callers) > 10, "calls")
        during = list(callers)
    assert set(during) == {"mlflow"}
    assert len(appended) == 40


def test_a_measurement_of_an_unknown_sae_is_an_error(params: Params, checkout: Path) -> None:
    with tracking.training_runs(params, {}) as run, pytest.raises(AssertionError, match="event of 'other'"):
        curves(run.tee(ignore), 1, "other")


DEATHS = [
    (ValueError("wrong"), "FAILED", "Ended by ValueError"),
    (TrainingError("the loss is nan"), "FAILED", "Failed: the loss is nan"),
    (StoppedError("step 3 of 9; run it again"), "KILLED", "Stopped: step 3 of 9; run it again"),
    (KeyboardInterrupt(), "KILLED", "Ended by KeyboardInterrupt"),
]


@pytest.mark.parametrize(("error", "status", "note"), DEATHS)
def test_a_run_that_dies_is_marked_as_failed(
    client: MlflowClient, params: Params, checkout: Path, error: BaseException, status: str, note: str
) -> None:
    with pytest.raises(type(error)), tracking.training_runs(params, {}) as run:
        curves(run.tee(ignore), 3)
        raise error
    assert only_run(client).info.status == status
    assert only_run(client).data.tags[runs.NOTE] == note
    assert len(client.get_metric_history(only_run(client).info.run_id, "loss")) == 3


def test_a_killed_run_is_closed_by_the_next(client: MlflowClient, params: Params, checkout: Path) -> None:
    killed = runs.Runs(params, {})
    killed.start()
    wait_for(lambda: client.get_experiment_by_name("ommatid") and [run.info.status for run in all_runs(client)] == ["RUNNING"], "a run")
    killed._stop.set()
    with tracking.training_runs(params, {}):
        pass
    assert sorted(run.info.status for run in all_runs(client)) == ["FINISHED", "KILLED"]


def test_worktree_logs_to_the_checkout_it_came_from(
    checkout: Path, client: MlflowClient, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "worktree").mkdir()
    monkeypatch.chdir(checkout / "worktree")
    monkeypatch.setenv("OMMATID_CHECKOUT", str(checkout))
    with tracking.training_runs(params, {}):
        pass
    assert only_run(client).info.status == "FINISHED"
    assert list((checkout / "worktree").iterdir()) == []


# servers that do not answer


class FakeServer(ThreadingHTTPServer):
    """Answers like an MLflow server until it is made to hang, and counts the points that it received."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.is_hung = threading.Event()
        self.n_points = 0

    @property
    def uri(self) -> str:
        return f"http://user:secret@127.0.0.1:{self.server_port}"


class FakeHandler(BaseHTTPRequestHandler):
    server: FakeServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self._answer({"experiment": {"experiment_id": "1", "name": "ommatid"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.is_hung.is_set():
            time.sleep(HANG_SECONDS)
        self.server.n_points += len(body.get("metrics", []))
        self._answer({"run": {"info": {"run_id": "r", "experiment_id": "1", "status": "RUNNING"}, "data": {}}} if "tags" in body else {})

    def _answer(self, value: dict) -> None:
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, checkout: Path) -> Iterator[FakeServer]:
    server = FakeServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.1)
    yield server
    server.shutdown()
    server.server_close()


def test_closed_port_costs_one_warning_and_a_few_seconds(
    checkout: Path, params: Params, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeServer() as gone:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", gone.uri)
    training, began = make_training(params), time.monotonic()
    with tracking.training_runs(params, {}) as run:
        curves(run.tee(ignore), 100)
        run.finish(training)
    assert time.monotonic() - began < HANG_SECONDS / 10  # MLflow itself tries for two minutes
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "cannot be used" in record.getMessage() and "\n" not in record.getMessage()
    assert "secret" not in record.getMessage()
    assert tracking.lineage(training.each())[ONE]["mlflow_run_id"] is None
    with pytest.raises(RunError, match="start the server"):
        tracking.get_champion()


def test_a_server_that_hangs_does_not_stop_training(server: FakeServer, params: Params, caplog: pytest.LogCaptureFixture) -> None:
    training = make_training(params)
    with tracking.training_runs(params, {}) as run:
        listener = run.tee(ignore)
        curves(listener, 10)
        wait_for(lambda: server.n_points == 20, "points")
        server.is_hung.set()
        began = time.monotonic()
        curves(listener, 10)
        assert time.monotonic() - began < float(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]), "training waits for no answer"
        run.finish(training)
    assert time.monotonic() - began < HANG_SECONDS / 10  # the server's answer would take ten times as long
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_a_server_that_comes_back_gets_everything(
    server: FakeServer, params: Params, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(runs, "LAST_CHANCE_SECONDS", HANG_SECONDS)
    with tracking.training_runs(params, {}) as run:
        server.is_hung.set()
        curves(run.tee(ignore), 10)
        wait_for(lambda: caplog.records, "a warning")
        server.is_hung.clear()
    assert server.n_points == 20
