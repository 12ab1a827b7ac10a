"""MLflow runs: one for each SAE of a training, with its curves, the numbers of later stages, and its lineage."""

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
from urllib.parse import quote

from ommatid.config import Params, dotted
from ommatid.errors import OmmatidError, StoppedError
from ommatid.events import Event, Listener
from ommatid.store import Artefact
from ommatid.tracking.client import SAE, call_or_warn, experiment_of, import_mlflow, join_seconds, make_client, patience, warn
from ommatid.tracking.journal import Journal, Page
from ommatid.tracking.model import log_model
from ommatid.tracking.provenance import TAGS, origin

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

FLUSH_SECONDS = 2.0
"""Seconds between two batches of points; sent one by one, a point costs 4 to 55 ms, in a batch 8 microseconds (measured)."""
TABLE_SECONDS = 60.0
"""Seconds between two uploads of the table of histograms, which is always sent as a whole."""
LAST_CHANCE_SECONDS = 3.0
"""Seconds for which the last batch is retried while the server refuses it."""

TRAINING = "ommatid.training"
"""Tag that identifies the training of a run, shared by all of its SAEs."""
REJECTED = "ommatid.rejected"
"""Prefix of the tag `ommatid.rejected.<stage>`: why the stage's gate rejected the SAE of a run while passing others."""
NOTE = "mlflow.note.content"
"""Tag that MLflow shows as the description of a run."""
HISTOGRAMS = "histograms.json"
"""Artifact of a run: a table of histograms of firing rates, encoder norms and biases at every measured step."""
EXPLORER = "explorer"
"""Tag with the address of the SAE's page in the explorer that `make up` started, which has the page once the catalogue is built."""
_PLACE = "ommatid.place"


class Runs:
    """The MLflow runs of a training, one for each SAE.

    A separate thread sends the events, so that training neither waits for MLflow nor fails with it.
    """

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
        self._failures: dict[str, str] = {}
        """Reasons why runs failed, by the name of the SAE."""
        self._warned = False
        self._is_lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def tee(self, listener: Listener) -> Listener:
        """Return a listener that records measurements and notices, and passes every event on to `listener`."""

        def listen(event: Event) -> None:
            self._journal.record(event)
            listener(event)

        return listen

    def finish(self, training: Artefact) -> None:
        """Send the rest of the curves, and log each SAE as an MLflow model and as a new version in the registry.

        Runs of rejected SAEs will end as FAILED, with the reason in their description.
        """
        self._failures = {name: f"Rejected: {reason}" for name, reason in training.rejected.items()}
        if self._flush_remaining():
            for name, sae in training.each().items():
                self._attempt(functools.partial(self._log_model, name, sae))

    def start(self) -> None:
        """Start the sending thread; called by `training_runs`."""
        # Imported here, not in the thread, because concurrent imports of the same packages can see partly initialised modules
        if self._attempt(import_mlflow):
            self._thread.start()

    def end(self, status: str, why: str | None = None) -> None:
        """Close the runs as FINISHED, FAILED or KILLED and record the reason; called by `training_runs`."""
        rejected = self._failures
        self._failures = rejected if why is None else dict.fromkeys(self._params, why)
        if self._flush_remaining():
            for name in self._params:
                self._attempt(functools.partial(self._close, name, "FAILED" if name in rejected else status))

    def _work(self) -> None:
        while True:
            self._attempt(self._flush)
            if self._stop.wait(FLUSH_SECONDS):
                return

    def _flush_remaining(self) -> bool:
        """Stop the thread and send the remaining events; return whether that succeeded."""
        self._stop.set()
        if self._thread.ident is None or self._is_lost:
            return False
        self._thread.join(join_seconds())
        self._is_lost = not self._attempt(_give_up if self._thread.is_alive() else self._flush_with_retries)
        return not self._is_lost

    def _flush_with_retries(self) -> None:
        """Send the remaining events, retrying for a few seconds, so that a restart of the server does not lose the run."""
        deadline = time.monotonic() + LAST_CHANCE_SECONDS
        while True:
            try:
                return self._flush()
            except Exception:
                if time.monotonic() + 1 > deadline:
                    raise
                time.sleep(1)

    def _flush(self) -> None:
        """Send all unsent events; if that fails, they are kept for the next attempt."""
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
        notes = [*page.notes, *([self._failures[name]] if name in self._failures else [])]
        if len(notes) > self._n_noted[name]:
            client.set_tag(run_id, NOTE, "\n\n".join(notes))
            self._n_noted[name] = len(notes)

    def _send_table(self, client: "MlflowClient", run_id: str, name: str, page: Page) -> None:
        if len(page.rows) > self._n_rows[name]:
            with patience():
                client.log_text(run_id, page.histograms(), HISTOGRAMS)
            self._n_rows[name] = len(page.rows)

    def _server(self, name: str) -> tuple["MlflowClient", str]:
        """Return the client and the run id of an SAE, creating both on first use."""
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
        # the explorer shows the checkout's own catalogue, which experiments have no part in
        if (explorer := os.environ.get("OMMATID_EXPLORER_URL")) and not os.environ.get("OMMATID_EXPERIMENT"):
            client.set_tag(run_id, EXPLORER, f"{explorer}/?sae={quote(sae.summary['sae'])}")

    def _close(self, name: str, status: str) -> None:
        client, run_id = self._server(name)
        client.set_terminated(run_id, status)

    def _attempt(self, action: Callable[[], Any]) -> bool:
        # Training must survive any failure of tracking, so every error ends here, as a single warning
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
    """Record a training in MLflow for the duration of the block.

    Args:
        params: All params of the training.
        inputs: Input artefacts, by stage.
        is_versioned: See `origin`.

    Yields:
        The runs, which end as FINISHED, or as FAILED or KILLED if the block raises.
    """
    runs = Runs(params, inputs, is_versioned)
    runs.start()
    try:
        yield runs
    except BaseException as error:
        has_failed = isinstance(error, Exception) and not isinstance(error, StoppedError)
        runs.end("FAILED" if has_failed else "KILLED", _reason(error))
        raise
    runs.end("FINISHED")


def _reason(error: BaseException) -> str:
    """Sentence that says why a run did not finish."""
    match error:
        case StoppedError():
            return f"Stopped: {error}"
        case OmmatidError():
            return f"Failed: {error}"
        case _:
            return f"Ended by {type(error).__name__}"


def lineage(saes: Mapping[str, Artefact], is_versioned: bool = True) -> dict[str, dict[str, str | None]]:
    """Find out where each SAE came from.

    The state of git and DVC is that of the SAE's training if MLflow has a run of it, and otherwise the current state.

    Args:
        saes: SAEs of a training, by name.
        is_versioned: See `origin`.

    Returns:
        For each SAE, git_commit, git_dirty, dvc_experiment, dvc_lock, prefect_flow_run_id and mlflow_run_id; None if not known.
    """
    runs = call_or_warn(lambda client: {name: _find_run(client, sae) for name, sae in saes.items()}) or {}
    current = origin(is_versioned) if not all(runs.get(name) for name in saes) else {}
    return {name: _lineage(runs.get(name), current) for name in saes}


def _lineage(run: "MlflowRun | None", current: Mapping[str, str]) -> dict[str, str | None]:
    tags = run.data.tags if run else current
    return {**{column: tags.get(tag) for column, tag in TAGS.items()}, "mlflow_run_id": run.info.run_id if run else None}


def log_stage(
    stage: str,
    saes: Mapping[str, Artefact],
    files: Sequence[Path],
    numbers: Mapping[str, Mapping[str, float]],
    sae_files: Mapping[str, Sequence[Path]] | None = None,
    rejected: Mapping[str, str] | None = None,
) -> None:
    """Add the results of a stage to the run of each SAE that has one.

    Args:
        stage: Name of the stage.
        saes: SAEs of the training, by name.
        files: Quality reports, shared by all SAEs.
        numbers: Results of each SAE, which become metrics `<stage>.<number>`.
        sae_files: Pictures of each SAE.
        rejected: Reasons why SAEs failed the stage's gate; their runs become FAILED, with the reason as tag `ommatid.rejected.<stage>`.
    """

    def log(client: "MlflowClient") -> None:
        for name, sae in saes.items():
            reason = (rejected or {}).get(name)
            _log_stage(client, stage, sae, [*files, *(sae_files or {}).get(name, ())], numbers[name], reason)

    call_or_warn(log)


def _training_of(params: Params, inputs: Mapping[str, Artefact]) -> str:
    """Identifier of a training, which stays the same when a killed training is resumed."""
    parts = [params.train.identity(), {name: artefact.digest for name, artefact in inputs.items()}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _open_experiment(client: "MlflowClient") -> str:
    experiment = experiment_of(client)
    _end_orphans(client, experiment)
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
    for i in range(0, len(flat), 100):  # MLflow accepts 100 params per request
        client.log_batch(run_id, params=flat[i : i + 100])


def _log_inputs(client: "MlflowClient", run_id: str, inputs: Mapping[str, Artefact]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    # MLflow truncates the digest of a data set to 36 characters; the tag ommatid.input.<stage> has it in full
    datasets = [
        DatasetInput(
            Dataset(name=name, digest=artefact.digest[:32], source_type="ommatid", source=json.dumps({"manifest": artefact.digest})),
            [InputTag("mlflow.data.context", "training")],
        )
        for name, artefact in inputs.items()
    ]
    client.log_inputs(run_id, datasets)


def _end_orphans(client: "MlflowClient", experiment: str) -> None:
    """Mark runs of this folder that still report RUNNING as KILLED; as the draft's lock admits one training at a time, they are dead."""
    orphans = client.search_runs([experiment], f"attributes.status = 'RUNNING' AND tags.`{_PLACE}` = '{_place()}'")
    for run in orphans:
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
    """Mark the run of an SAE as FAILED if a stage rejected it, and as FINISHED again once the stage passes it."""
    tag = f"{REJECTED}.{stage}"
    if rejected:
        client.set_tag(run.info.run_id, tag, rejected)
        client.update_run(run.info.run_id, "FAILED")
    elif tag in run.data.tags:
        client.delete_tag(run.info.run_id, tag)
        client.update_run(run.info.run_id, "FINISHED")


def _find_run(client: "MlflowClient", sae: Artefact) -> "MlflowRun | None":
    """Find the newest run that trained this SAE."""
    experiment = experiment_of(client)
    found = client.search_runs([experiment], f"tags.`{SAE}` = '{sae.digest}'", max_results=1, order_by=["attributes.start_time DESC"])
    return found[0] if found else None
