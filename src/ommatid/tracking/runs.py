"""Runs in MLflow: one for each SAE of a training, with its curves, what later stages add to it, and lineage."""

import functools
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ommatid.config import Params, dotted
from ommatid.errors import OmmatidError, StoppedError
from ommatid.events import Event, Listener
from ommatid.store import Artefact
from ommatid.tracking.client import SAE, experiment_of, import_mlflow, join_seconds, make_client, patience, quietly, warn
from ommatid.tracking.journal import Journal, Page
from ommatid.tracking.model import log_model
from ommatid.tracking.origin import origin

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

FLUSH_SECONDS = 2.0
"""Points are sent this often: one by one they cost 4 to 55 ms each, in batches 8 microseconds (measured)."""
TABLE_SECONDS = 60.0
"""The table of histograms, which is sent whole, is sent this often."""
LAST_CHANCE_SECONDS = 3.0
"""How long the end of a run tries again while the server refuses."""

TRAINING = "ommatid.training"
"""Tag of a run: names the training, so that all SAEs of it are found together."""
REJECTED = "ommatid.rejected"
"""Tag of a run, with the stage after a dot: why the gate of that stage rejected its SAE, where it passed others."""
NOTE = "mlflow.note.content"
"""Tag of a run: what MLflow shows as its description."""
HISTOGRAMS = "histograms.json"
"""Artifact of a run: a table of how often latents fire, encoder norms and biases, at every step that was measured."""
_PLACE = "ommatid.place"


class Runs:
    """The runs of a training, one for each SAE, on their way into MLflow by one thread: training neither waits nor fails with it."""

    def __init__(self, params: Params, inputs: Mapping[str, Artefact], is_versioned: bool = True):
        self._params = {name: params.model_copy(update={"train": one}) for name, one in params.train.each().items()}
        self._inputs = inputs
        self._is_versioned = is_versioned
        self._training = _training_of(params, inputs)
        self._journal = Journal(list(self._params))
        self._n_noted = dict.fromkeys(self._params, 0)
        self._n_rows = dict.fromkeys(self._params, 0)
        self._next_table = time.monotonic() + TABLE_SECONDS
        self._client: MlflowClient | None = None
        self._experiment: str | None = None
        self._run_ids: dict[str, str] = {}
        self._described: set[str] = set()
        self._why: dict[str, str] = {}
        """Of runs that failed: the reason."""
        self._warned = False
        self._is_lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def tee(self, listener: Listener) -> Listener:
        """A listener that records what is measured and noticed, and passes every event on."""

        def listen(event: Event) -> None:
            self._journal.hear(event)
            listener(event)

        return listen

    def finish(self, training: Artefact) -> None:
        """Send the rest of the curves and the models: each as an MLflow model, and as a new version in the registry.

        The runs of SAEs that were rejected will end as FAILED, with the reason.
        """
        self._why = {name: f"Rejected: {reason}" for name, reason in training.rejected.items()}
        if self._flush_at_last():
            for name, sae in training.each().items():
                self._attempt(functools.partial(self._log_model, name, sae))

    def start(self) -> None:
        """Begin to send; called by `training_runs`."""
        # Imported here, not in the thread: two threads that import the same packages can see each other's half-made modules
        if self._attempt(import_mlflow):
            self._thread.start()

    def end(self, status: str, why: str | None = None) -> None:
        """Close the runs as FINISHED, FAILED or KILLED, and note why; called by `training_runs`."""
        rejected = self._why
        self._why = rejected if why is None else dict.fromkeys(self._params, why)
        if self._flush_at_last():
            for name in self._params:
                self._attempt(functools.partial(self._close, name, "FAILED" if name in rejected else status))

    def _work(self) -> None:
        while True:
            self._attempt(self._flush)
            if self._stop.wait(FLUSH_SECONDS):
                return

    def _flush_at_last(self) -> bool:
        """Take over from the thread and send what is left; False when the server does not take it."""
        self._stop.set()
        if self._thread.ident is None or self._is_lost:
            return False
        self._thread.join(join_seconds())
        self._is_lost = not self._attempt(_give_up if self._thread.is_alive() else self._flush_patiently)
        return not self._is_lost

    def _flush_patiently(self) -> None:
        """Try for a few seconds: a server that restarts should not cost the whole run."""
        deadline = time.monotonic() + LAST_CHANCE_SECONDS
        while True:
            try:
                return self._flush()
            except Exception:
                if time.monotonic() + 1 > deadline:
                    raise
                time.sleep(1)

    def _flush(self) -> None:
        """Send what has gathered; what a failing server did not take stays for the next time."""
        self._journal.sort()
        is_time = self._stop.is_set() or time.monotonic() > self._next_table
        for name, page in self._journal.pages.items():
            client, run_id = self._server(name)
            for batch in page.iter_metrics():
                client.log_batch(run_id, metrics=batch)
            page.unsent.clear()
            self._send_notes(client, run_id, name, page)
            if is_time:
                self._send_table(client, run_id, name, page)
        if is_time:
            self._next_table = time.monotonic() + TABLE_SECONDS

    def _send_notes(self, client: "MlflowClient", run_id: str, name: str, page: Page) -> None:
        notes = [*page.notes, *([self._why[name]] if name in self._why else [])]
        if len(notes) > self._n_noted[name]:
            client.set_tag(run_id, NOTE, "\n\n".join(notes))
            self._n_noted[name] = len(notes)

    def _send_table(self, client: "MlflowClient", run_id: str, name: str, page: Page) -> None:
        if len(page.rows) > self._n_rows[name]:
            with patience():
                client.log_text(run_id, page.histograms(), HISTOGRAMS)
            self._n_rows[name] = len(page.rows)

    def _server(self, name: str) -> tuple["MlflowClient", str]:
        """The client and the run of an SAE, made when first asked for."""
        if self._client is None:
            self._client = make_client()
        if self._experiment is None:
            self._experiment = _open_experiment(self._client)
        if name not in self._run_ids:
            run_name = name if len(self._params) > 1 else os.environ.get("OMMATID_EXPERIMENT")
            self._run_ids[name] = _create_run(self._client, self._experiment, run_name, self._training, self._inputs, self._is_versioned)
        if name not in self._described:
            _describe(self._client, self._run_ids[name], self._params[name], self._inputs)
            self._described.add(name)
        return self._client, self._run_ids[name]

    def _log_model(self, name: str, sae: Artefact) -> None:
        client, run_id = self._server(name)
        with patience():
            log_model(client, run_id, sae)
        client.set_tag(run_id, SAE, sae.digest)

    def _close(self, name: str, status: str) -> None:
        client, run_id = self._server(name)
        client.set_terminated(run_id, status)

    def _attempt(self, action: Callable[[], Any]) -> bool:
        # Whatever goes wrong with tracking, training is worth more: this is the edge where it ends as one warning
        try:
            action()
        except Exception as error:
            if not self._warned:
                warn(error)
            self._warned = True
            return False
        return True


def _give_up() -> None:
    raise TimeoutError(f"no answer in {join_seconds():g} seconds")


@contextmanager
def training_runs(params: Params, inputs: Mapping[str, Artefact], is_versioned: bool = True) -> Iterator[Runs]:
    """MLflow runs around a training; they end as FAILED or KILLED when the block does. `is_versioned`: see `origin`."""
    runs = Runs(params, inputs, is_versioned)
    runs.start()
    try:
        yield runs
    except BaseException as error:
        has_failed = isinstance(error, Exception) and not isinstance(error, StoppedError)
        runs.end("FAILED" if has_failed else "KILLED", _why(error))
        raise
    runs.end("FINISHED")


def _why(error: BaseException) -> str:
    """What a run that did not finish says of itself."""
    match error:
        case StoppedError():
            return f"Stopped: {error}"
        case OmmatidError():
            return f"Failed: {error}"
        case _:
            return f"Ended by {type(error).__name__}"


def lineage(saes: Mapping[str, Artefact], is_versioned: bool = True) -> dict[str, dict[str, str | None]]:
    """Where each SAE came from; a value is None when it is not known.

    With an MLflow run of this SAE: git and DVC as they were when it was trained. Without one: as they are here and now.
    `is_versioned`: see `origin`.
    """
    found = quietly(lambda client: {name: _find_run(client, sae) for name, sae in saes.items()}) or {}
    here = origin(is_versioned) if not all(found.get(name) for name in saes) else {}
    return {name: _lineage(found.get(name), here) for name in saes}


def _lineage(found: "MlflowRun | None", here: Mapping[str, str]) -> dict[str, str | None]:
    tags = found.data.tags if found else here
    return {
        "git_commit": tags.get("mlflow.source.git.commit"),
        "git_dirty": tags.get("git.dirty"),
        "dvc_experiment": tags.get("dvc.experiment"),
        "dvc_lock": tags.get("dvc.lock"),
        "prefect_flow_run_id": tags.get("prefect.flow_run"),
        "mlflow_run_id": found.info.run_id if found else None,
    }


def log_stage(
    stage: str,
    saes: Mapping[str, Artefact],
    files: Sequence[Path],
    numbers: Mapping[str, Mapping[str, float]],
    own_files: Mapping[str, Sequence[Path]] | None = None,
    rejected: Mapping[str, str] | None = None,
) -> None:
    """Add to the run of each SAE, when there is one, what a stage found.

    Args:
        stage: Which.
        saes: SAEs of the training, by name.
        files: Quality reports, the same for all.
        numbers: Of each SAE, which become metrics `<stage>.<number>`.
        own_files: Pictures of each SAE.
        rejected: SAEs that failed the stage's gate, and why: their runs are FAILED from then on, with tag `ommatid.rejected.<stage>`.
    """

    def log(client: "MlflowClient") -> None:
        for name, sae in saes.items():
            reason = (rejected or {}).get(name)
            _log_stage(client, stage, sae, [*files, *(own_files or {}).get(name, ())], numbers[name], reason)

    quietly(log)


def _training_of(params: Params, inputs: Mapping[str, Artefact]) -> str:
    """The same for a training that was killed and goes on."""
    parts = [params.train.identity(), {name: artefact.digest for name, artefact in inputs.items()}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _open_experiment(client: "MlflowClient") -> str:
    experiment = experiment_of(client)
    _bury(client, experiment)
    return experiment


def _create_run(
    client: "MlflowClient", experiment: str, name: str | None, training: str, inputs: Mapping[str, Artefact], is_versioned: bool
) -> str:
    of_inputs = {f"ommatid.input.{stage}": artefact.digest for stage, artefact in inputs.items()}
    tags = {**origin(is_versioned), TRAINING: training, _PLACE: _place(), **of_inputs}
    return client.create_run(experiment, run_name=name, tags=tags).info.run_id


def _describe(client: "MlflowClient", run_id: str, params: Params, inputs: Mapping[str, Artefact]) -> None:
    _log_params(client, run_id, params)
    _log_inputs(client, run_id, inputs)


def _log_params(client: "MlflowClient", run_id: str, params: Params) -> None:
    from mlflow.entities import Param

    flat = [Param(key, value if isinstance(value, str) else json.dumps(value)) for key, value in dotted(params).items()]
    for i in range(0, len(flat), 100):  # MLflow's limit of params a request
        client.log_batch(run_id, params=flat[i : i + 100])


def _log_inputs(client: "MlflowClient", run_id: str, inputs: Mapping[str, Artefact]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    # MLflow cuts a data set's digest at 36 characters; the tag ommatid.input.<stage> has all of it
    datasets = [
        DatasetInput(
            Dataset(name=name, digest=artefact.digest[:32], source_type="ommatid", source=json.dumps({"manifest": artefact.digest})),
            [InputTag("mlflow.data.context", "training")],
        )
        for name, artefact in inputs.items()
    ]
    client.log_inputs(run_id, datasets)


def _bury(client: "MlflowClient", experiment: str) -> None:
    """Runs of this place that still say RUNNING were killed: the draft's lock lets only one train here at a time."""
    left = client.search_runs([experiment], f"attributes.status = 'RUNNING' AND tags.`{_PLACE}` = '{_place()}'")
    for run in left:
        client.set_terminated(run.info.run_id, "KILLED")


def _place() -> str:
    return hashlib.sha256(f"{socket.gethostname()}:{Path.cwd()}".encode()).hexdigest()[:16]


def _log_stage(
    client: "MlflowClient", stage: str, sae: Artefact, reports: Sequence[Path], numbers: Mapping[str, float], rejected: str | None
) -> None:
    from mlflow.entities import Metric

    run = _find_run(client, sae)
    if run is None:
        return
    now = time.time_ns() // 1_000_000
    client.log_batch(run.info.run_id, metrics=[Metric(f"{stage}.{key}", float(value), now, 0) for key, value in numbers.items()])
    for path in reports:
        client.log_artifact(run.info.run_id, str(path), "quality")
    _log_verdict(client, stage, run, rejected)


def _log_verdict(client: "MlflowClient", stage: str, run: "MlflowRun", rejected: str | None) -> None:
    """Let the run of an SAE that a stage rejected be FAILED until the stage passes it."""
    tag = f"{REJECTED}.{stage}"
    if rejected:
        client.set_tag(run.info.run_id, tag, rejected)
        client.update_run(run.info.run_id, "FAILED")
    elif tag in run.data.tags:
        client.delete_tag(run.info.run_id, tag)
        client.update_run(run.info.run_id, "FINISHED")


def _find_run(client: "MlflowClient", sae: Artefact) -> "MlflowRun | None":
    """The newest run that made this SAE."""
    experiment = experiment_of(client)
    found = client.search_runs([experiment], f"tags.`{SAE}` = '{sae.digest}'", max_results=1, order_by=["attributes.start_time DESC"])
    return found[0] if found else None
