"""Execution of one stage from end to end: open inputs, compute the draft, pass the gate, publish the artefact, and log to MLflow."""

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
from ommatid.pipeline.checkout import StageWatch, watch_stage
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
    """Wrap the function that runs a stage, so that if the machine lacks something, a MachineError says what it is and what to do."""

    @functools.wraps(run)
    def explained(name: str, *args: P.args, **kwargs: P.kwargs) -> Artefact:
        try:
            return run(name, *args, **kwargs)
        except Exception as error:
            if (lack := find_lack(error)) is None:
                raise
            what, remedy = lack.value
            advice = STAGES[name].memory_advice
            if advice and lack in (Lack.MEMORY, Lack.DEVICE_MEMORY, Lack.THREADS):
                remedy = f"{advice}; or {remedy}"
            raise MachineError(
                f"{name}: {what} ({describe(error)}); {remedy}; then run the stage again: what is finished is kept"
            ) from error

    return explained


@_explain_lacks
def run_stage(
    name: str,
    params: Params,
    on_event: Listener,
    data: str = DATA,
    must_pass: bool = True,
    run: Callable[[Any, Mapping[str, Artefact], Draft, Listener], Artefact] | None = None,
    watch: StageWatch | None = None,
) -> Artefact:
    """Run one stage in the current directory. If another process is making the same artefact, wait for it and return that artefact.

    If only some of several SAEs fail the gate, the artefact is published, and its summary lists these in `rejected` with the reasons.
    Rejected SAEs stay in the artefact's folder, complete, but they are no longer its children, and no later stage reads them.

    Args:
        name: Name of the stage.
        params: All params.
        on_event: Called with each progress event and warning.
        data: Root of all artefacts and of the gates' reports, a path or URL.
        must_pass: Whether to raise an error if the artefact fails the gate. If not, as in trials on samples, failures are only reported.
        run: Function that computes the artefact in place of the stage's own `run`, for trials of training.
        watch: Watch of the checkout since before the params were read; None means from now on.

    Returns:
        The published artefact.

    Raises:
        GateError: A check failed for the only SAE, for every SAE, or for the artefact as a whole. Nothing is published, but the report
            is written.
        MachineError: The machine lacks memory, disk space, threads or a permission.
        RunError: DVC runs the stage, and another branch was checked out meanwhile, or the stage's section of params.yaml was edited.
        OmmatidError: An input is missing or damaged, or the user's values cannot be used.
    """
    stage, place = STAGES[name], place_of(name, data)
    watch = (watch or watch_stage(name)) if is_checkouts(data) else None
    inputs = open_inputs(name, params, data)
    section = getattr(params, name)

    def on_wait(line: str) -> None:
        on_event(Progress(line, 0, 1))

    pictures: Mapping[str, list[Path]] = {}
    with _open_reports(stage, data) as reports, store.open_draft(place, stage.kind, section.identity(), inputs, on_wait) as draft:
        for earlier, artefact in inputs.items():
            for sae, reason in artefact.rejected.items():
                on_event(Warned(f"{name}: {sae} is left out because {earlier} rejected it: {reason}"))
        if draft.published:
            if watch:
                watch.check()
            _warn_of_rejected(name, draft.published, place, on_event)
            return draft.published
        with _recording(stage, params, inputs, data) as runs:
            artefact = draft.sealed() or (run or stage.run)(section, inputs, draft, runs.tee(on_event) if runs else on_event)
            artefact = artefact.leaving_out(())  # a killed run may have rejected some SAEs, but the gate judges all of them again
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
        if watch:
            watch.check()
        published = draft.publish(place)
        if stage.is_tracked:
            _track(stage, inputs.get("train", published), published, files, pictures, reports.path)
    return published


def follow_training(params: Params, data: str = DATA) -> None:
    """Take part in training as a process that `torchrun` started, other than the first, which runs the stage and writes the artefact.

    Raises:
        OmmatidError: An input is missing or damaged, or training cannot go on.
    """
    from ommatid.train.stage import follow

    follow(params.train, open_inputs("train", params, data))


def _warn_of_rejected(name: str, artefact: Artefact, place: Folder, on_event: Listener) -> None:
    for sae, reason in artefact.rejected.items():
        on_event(Warned(f"{name}: {sae} is rejected: {reason}; it is kept in {place / sae}, but no later stage reads it"))


@dataclass(frozen=True)
class _Reports:
    """Folder of the gates' reports."""

    path: Path
    """Path of the folder on this machine."""
    shown: str
    """Path or URL at which the user finds it."""


@contextmanager
def _open_reports(stage: Stage, data: str) -> Iterator[_Reports]:
    """Open the reports' folder of a data root. For an object store it is a local folder, which is uploaded at the end."""
    folder = open_folder(data) / QUALITY.name
    # The MLflow runs of a recorded stage also receive the reports of earlier stages.
    earlier = [file.name for file in _earlier_reports(stage, Path())] if stage.recorder else []
    with folder.mirror(earlier, replace=HEALTH) as path:
        yield _Reports(path, f"{path.absolute()}" if folder.is_local else folder.url)


def _earlier_reports(stage: Stage, folder: Path) -> list[Path]:
    """Return the paths of the reports of all earlier stages, which have no MLflow runs of their own."""
    names = list(STAGES)
    return [folder / f"{earlier}{suffix}" for earlier in names[: names.index(stage.name)] for suffix in (".json", ".html")]


def _recording(stage: Stage, params: Params, inputs: Mapping[str, Artefact], data: str) -> AbstractContextManager["Runs | None"]:
    """Return the context in which a stage runs. For a recorded stage it opens MLflow runs, which end as failed if the block raises."""
    return load(stage.recorder)(params, inputs, is_checkouts(data)) if stage.recorder else nullcontext()


def _judge(
    stage: Stage, artefact: Artefact, params: Params, training: Artefact, draft: Draft, reports: _Reports, must_pass: bool
) -> tuple[Artefact, list[Path]]:
    """Check a stage's artefact with its gate, and write the gate's report.

    Returns:
        The artefact without the SAEs that failed, and the report's files.

    Raises:
        GateError: The artefact must pass but failed as a whole; its draft is discarded.
    """
    # The params come from the SAEs' manifests, because those given now may differ from those they were trained with.
    saes = {name: TrainParams.model_validate(sae.manifest.params) for name, sae in training.each().items()} if stage.is_per_sae else {}
    report = quality.check(stage.name, artefact, params, saes)
    json_path, html_path = quality.write_report(report, reports.path)
    if must_pass and report.rejected:
        artefact = draft.reseal(artefact, _reject(artefact.summary, report.rejected))
    elif must_pass and not report.success:
        draft.discard()
        failures = "; ".join(f"{check.title}: {check.detail}" for check in report.failures)
        raise GateError(
            f"{stage.name}: {GateError.WORDS}: {failures}; nothing was published; the report is {reports.shown}/{html_path.name}"
        )
    return artefact, [json_path, html_path]


def _reject(summary: Mapping[str, Any], rejected: Mapping[str, str]) -> dict[str, Any]:
    """Return the summary of a stage's SAEs once some are rejected."""
    passed = {sae: numbers_of_sae for sae, numbers_of_sae in summary["of"].items() if sae not in rejected}
    return {**summary, "saes": list(passed), "of": passed, "rejected": dict(rejected)}


def _track(
    stage: Stage, training: Artefact, artefact: Artefact, files: list[Path], pictures: Mapping[str, list[Path]], reports: Path
) -> None:
    """Send numbers and reports to the MLflow run of each SAE."""
    if stage.recorder:
        files = [*(path for path in _earlier_reports(stage, reports) if path.exists()), *files]
    children = artefact.leaving_out(()).each()  # empty for a catalogue, which is about all SAEs together
    of_saes = {sae: numbers(children[sae].summary) if children else {} for sae in training.children}
    tracking.log_stage(stage.name, training.each(), files, of_saes, pictures, artefact.rejected)
