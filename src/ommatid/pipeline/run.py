"""One stage from end to end: inputs opened, draft computed, gate passed, artefact in place, numbers and reports in MLflow."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from ommatid import quality, store, tracking
from ommatid.config import Params, TrainParams
from ommatid.errors import GateError, Lack, MachineError, describe, find_lack
from ommatid.events import Listener, Progress, Warned
from ommatid.pipeline import STAGES, place_of
from ommatid.pipeline.inputs import open_inputs
from ommatid.stage import DATA, HEALTH, QUALITY, Stage, is_checkouts, load
from ommatid.store import Artefact, Draft
from ommatid.store.filesystem import Folder, open_folder
from ommatid.store.per_sae import numbers
from ommatid.summaries import check_keys

if TYPE_CHECKING:
    from ommatid.tracking import Runs

P = ParamSpec("P")


def _explain_lacks(run: Callable[Concatenate[str, P], Artefact]) -> Callable[Concatenate[str, P], Artefact]:
    """Wrap the run of a stage, so that whatever the machine lacked is named by a MachineError that says what to do."""

    @functools.wraps(run)
    def explained(name: str, *args: P.args, **kwargs: P.kwargs) -> Artefact:
        try:
            return run(name, *args, **kwargs)
        except Exception as error:
            if (lack := find_lack(error)) is None:
                raise
            what, todo = lack.value
            advice = STAGES[name].memory_advice
            if advice and lack in (Lack.MEMORY, Lack.DEVICE_MEMORY, Lack.THREADS):
                todo = f"{advice}; or {todo}"
            raise MachineError(f"{name}: {what} ({describe(error)}); {todo}; then run the stage again: what is finished is kept") from error

    return explained


@_explain_lacks
def run_stage(
    name: str,
    params: Params,
    on_event: Listener,
    data: str = DATA,
    must_pass: bool = True,
    run: Callable[[Any, Mapping[str, Artefact], Draft, Listener], Artefact] | None = None,
) -> Artefact:
    """Run one stage in the current directory. If another process is making the same artefact, wait for it and take that one.

    If some of several SAEs fail the gate, the artefact is published with the rest as its children; its summary lists the rejected ones
    with their reasons in `rejected`. They stay inside it, complete, but no later stage reads them.

    Args:
        name: Name of the stage.
        params: All params.
        on_event: Called with each progress event and warning.
        data: Root of all artefacts and of the gates' reports, a path or URL.
        must_pass: Whether an artefact that fails the gate stays unpublished. Trials on samples only report failures.
        run: Computes the artefact in place of the stage's own `run`, as a trial of training needs it.

    Returns:
        The published artefact.

    Raises:
        GateError: a check failed for the only SAE, for all of them, or for the whole; nothing is published, the report is written.
        MachineError: the machine lacks memory, disk space, threads, or the right to something.
        OmmatidError: an input is missing or damaged, or the user's values cannot be used.
    """
    stage, place = STAGES[name], place_of(name, data)
    inputs = open_inputs(name, params, data)
    section = getattr(params, name)

    def on_wait(line: str) -> None:
        on_event(Progress(line, 0, 1))

    pictures: Mapping[str, list[Path]] = {}
    with _open_reports(stage, data) as reports, store.open_draft(place, stage.kind, section.identity(), inputs, on_wait) as draft:
        for earlier, artefact in inputs.items():
            for sae, reason in artefact.rejected.items():
                on_event(Warned(f"{name}: {sae} is left out, for {earlier} rejected it: {reason}"))
        if draft.published:
            _warn_of_rejected(name, draft.published, place, on_event)
            return draft.published
        with _recording(stage, params, inputs, data) as runs:
            artefact = draft.sealed() or (run or stage.run)(section, inputs, draft, runs.tee(on_event) if runs else on_event)
            artefact = artefact.leaving_out(())  # a run that was killed may have rejected some: all are judged again
            for one in (artefact, *artefact.each().values()):
                check_keys(one.manifest.kind, one.summary)
            if stage.drawer:
                pictures = load(stage.drawer)(artefact, reports.path)
            artefact, files = _judge(stage, artefact, params, inputs.get("train", artefact), draft, reports, must_pass)
            _warn_of_rejected(name, artefact, place, on_event)
            if stage.reporter:
                files.append(load(stage.reporter)(artefact, reports.path))
            if runs:
                runs.finish(artefact)
        published = draft.publish(place)
        if stage.is_tracked:
            _track(stage, inputs.get("train", published), published, files, pictures, reports.path)
    return published


def follow_training(params: Params, data: str = DATA) -> None:
    """Train beside the process that runs the stage and alone writes: the job of every process that `torchrun` starts but the first.

    Raises:
        OmmatidError: an input is missing or damaged, or training cannot go on.
    """
    from ommatid.train.stage import follow

    follow(params.train, open_inputs("train", params, data))


def _warn_of_rejected(name: str, artefact: Artefact, place: Folder, on_event: Listener) -> None:
    for sae, reason in artefact.rejected.items():
        on_event(Warned(f"{name}: {sae} is rejected: {reason}; it is kept in {place / sae}, and no later stage reads it"))


@dataclass(frozen=True)
class _Reports:
    """The folder of the gates' reports."""

    path: Path
    """Folder on this machine."""
    shown: str
    """Path or URL under which a user finds it."""


@contextmanager
def _open_reports(stage: Stage, data: str) -> Iterator[_Reports]:
    """Open the reports' folder of a data root. That of an object store is a local folder, uploaded when the block ends."""
    folder = open_folder(data) / QUALITY.name
    # the runs of a recorded stage take along the reports of the stages before
    earlier = [file.name for file in _earlier_reports(stage, Path())] if stage.recorder else []
    with folder.mirror(earlier, replace=HEALTH) as path:
        yield _Reports(path, f"{path.absolute()}" if folder.is_local else folder.url)


def _earlier_reports(stage: Stage, folder: Path) -> list[Path]:
    """Return the files of the reports of all stages before this one, which had no MLflow run to go to."""
    names = list(STAGES)
    return [folder / f"{earlier}{suffix}" for earlier in names[: names.index(stage.name)] for suffix in (".json", ".html")]


def _recording(stage: Stage, params: Params, inputs: Mapping[str, Artefact], data: str) -> AbstractContextManager["Runs | None"]:
    """Return the context in which a stage is computed: of one that is recorded, MLflow runs that fail if the block does."""
    return load(stage.recorder)(params, inputs, is_checkouts(data)) if stage.recorder else nullcontext()


def _judge(
    stage: Stage, artefact: Artefact, params: Params, training: Artefact, draft: Draft, reports: _Reports, must_pass: bool
) -> tuple[Artefact, list[Path]]:
    """Hold a stage's artefact against its gate and write the gate's report.

    Returns:
        The artefact, without the SAEs that failed; and the report's files.

    Raises:
        GateError: the artefact failed as a whole and must pass; its draft is discarded.
    """
    # each manifest has the params that its SAE was trained with: those given now may differ
    saes = {name: TrainParams.model_validate(sae.manifest.params) for name, sae in training.each().items()} if stage.is_per_sae else {}
    report = quality.check(stage.name, artefact, params, saes)
    json_path, html_path = quality.write_report(report, reports.path)
    if must_pass and report.rejected:
        artefact = draft.reseal(artefact, _reject(artefact.summary, report.rejected))
    elif must_pass and not report.success:
        draft.discard()
        failures = "; ".join(f"{check.title}: {check.detail}" for check in report.failures)
        raise GateError(
            f"{stage.name}: quality gate failed: {failures}; nothing was published; the report is {reports.shown}/{html_path.name}"
        )
    return artefact, [json_path, html_path]


def _reject(summary: Mapping[str, Any], rejected: Mapping[str, str]) -> dict[str, Any]:
    """Return the summary of a stage's SAEs once some are rejected."""
    passed = {sae: found for sae, found in summary["of"].items() if sae not in rejected}
    return {**summary, "saes": list(passed), "of": passed, "rejected": dict(rejected)}


def _track(
    stage: Stage, training: Artefact, artefact: Artefact, files: list[Path], pictures: Mapping[str, list[Path]], reports: Path
) -> None:
    """Send numbers and reports to the MLflow run of each SAE."""
    if stage.recorder:
        files = [*(path for path in _earlier_reports(stage, reports) if path.exists()), *files]
    made = artefact.leaving_out(()).each()  # a catalogue has no artefact for each SAE: it is about all of them
    of_saes = {sae: numbers(made[sae].summary) if made else {} for sae in training.children}
    tracking.log_stage(stage.name, training.each(), files, of_saes, pictures, artefact.rejected)
