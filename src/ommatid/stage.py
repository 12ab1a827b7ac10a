"""One stage from end to end: inputs opened, draft computed, gate passed, artefact in place."""

import functools
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, assert_never

from ommatid import quality, store
from ommatid.config import ExtractFiles, ExtractParams, Params, Section, TrainParams, dotted, make_params
from ommatid.errors import ArtefactError, GateError, Lack, MachineError, describe, find_lack
from ommatid.events import Listener, Progress, Warned, about, ignore
from ommatid.store import INSIDE, Artefact, Draft
from ommatid.store.filesystem import Folder, open_folder

if TYPE_CHECKING:
    from ommatid.tracking import Runs


P = ParamSpec("P")


@dataclass(frozen=True)
class Stage:
    """What a stage reads and makes."""

    kind: str
    """Kind of the artefact it makes."""
    place: Path
    """Where the artefact goes, relative to the checkout; with another root than `DATA`, its name there."""
    inputs: tuple[str, ...]
    """Stages whose artefacts it reads."""


STAGES: Mapping[str, Stage] = {
    "images": Stage("images", Path("data/images"), ()),
    "extract": Stage("extraction", Path("data/activations"), ("images",)),
    "train": Stage("training", Path("data/sae"), ("extract",)),
    "evaluate": Stage("evaluations", Path("data/evaluation"), ("images", "extract", "train")),
    "label": Stage("labellings", Path("data/labels"), ("images", "extract", "train", "evaluate")),
    "catalog": Stage("catalog", Path("data/catalog"), ("images", "extract", "train", "evaluate", "label")),
}

DATA = "data"
"""Root of the artefacts where no other is given, relative to the checkout."""
TRACKED = ("train", "evaluate", "label")
"""Stages with an artefact inside for each SAE: its numbers go to the SAE's MLflow run."""
DECODING = ("train", "evaluate")
"""Stages that compare what an SAE decodes with what it should: of a transcoder they read `target`, too."""
QUALITY = Path("data/quality")
"""Folder of the gates' reports, relative to the checkout; with another root than `DATA`, its name there."""
HEALTH = "health"
"""Folder in it with a picture of each dictionary that was trained."""
REPORT = "report.html"
"""Page in it about what was found, made with the catalogue."""


def open_stage(name: str, hookpoint: str | None = None, data: str = DATA) -> Artefact:
    """The artefact that a stage made in this checkout, or below another path or URL; of `extract` the activations at a hookpoint.

    Raises:
        ArtefactError: missing or damaged, or not extracted at that hookpoint.
    """
    artefact = store.open_artefact(_place(name, data), STAGES[name].kind)
    return artefact.child(hookpoint, "activations") if name == "extract" and hookpoint else artefact


def _place(name: str, data: str) -> Folder:
    return open_folder(data) / STAGES[name].place.name


LESS = {
    "extract": "lower extract.batch_size, or extract.executor.workers where there are several",
    "train": "lower train.batch_size or train.d_sae, or train fewer SAEs at a time (train.runs, train.grid)",
    "evaluate": "leave out evaluate.baselines, or evaluate SAEs of a lower train.d_sae",
    "label": "name fewer label.labellers at a time",
}
"""How a stage takes less memory; the others take little, whatever their params."""


def _telling_lacks(run: Callable[Concatenate[str, P], Artefact]) -> Callable[Concatenate[str, P], Artefact]:
    """Have a stage say what the machine lacks, where that ends it."""

    @functools.wraps(run)
    def telling(name: str, *args: P.args, **kwargs: P.kwargs) -> Artefact:
        try:
            return run(name, *args, **kwargs)
        except Exception as error:
            if (lack := find_lack(error)) is None:
                raise
            what, todo = lack.value
            if lack in (Lack.MEMORY, Lack.DEVICE_MEMORY, Lack.THREADS) and name in LESS:
                todo = f"{LESS[name]}; or {todo}"
            raise MachineError(f"{name}: {what} ({describe(error)}); {todo}; then run the stage again: what is finished is kept") from error

    return telling


@_telling_lacks
def run_stage(
    name: str,
    params: Params,
    on_event: Listener,
    data: str = DATA,
    must_pass: bool = True,
    run: Callable[[Any, Mapping[str, Artefact], Draft, Listener], Artefact] | None = None,
) -> Artefact:
    """Run one stage in the current directory; where another process is making the same artefact, wait for it and take that one.

    Args:
        name: The stage.
        params: All of them.
        on_event: Hears of progress.
        data: Root of all artefacts and of the gates' reports, a path or URL.
        must_pass: Publish nothing that fails the gate; False: only report it, as trials on samples need it.
        run: Computes the artefact in place of the stage's own function, as a trial of training needs it; None: the stage's own.

    Where some of several SAEs fail the gate, the artefact is published: the rest are its children, and its summary says in `rejected`
    which are not, and why. These are inside it, too, whole; no later stage reads them.

    Raises:
        GateError: a check failed for the only SAE, for all of them, or for the whole; nothing is published, the report is written.
        MachineError: memory, disk or threads do not suffice.
        OmmatidError: an input is missing or damaged, or the user's values cannot be used.
    """
    stage = STAGES[name]
    place = _place(name, data)
    inputs = _open_inputs(name, params, data)
    section: Section = getattr(params, name)

    def on_wait(line: str) -> None:
        on_event(Progress(line, 0, 1))

    pictures: dict[str, list[Path]] = {}
    with _open_reports(name, data) as reports, store.open_draft(place, stage.kind, section.identity(), inputs, on_wait) as draft:
        for earlier, given in inputs.items():
            for sae, reason in given.rejected.items():
                on_event(Warned(f"{name}: {sae} is left out, for {earlier} rejected it: {reason}"))
        if draft.published:
            _tell_rejected(name, draft.published, place, on_event)
            return draft.published
        with _training_runs(name, params, inputs, data) as runs:
            listener = runs.tee(on_event) if runs else on_event
            artefact = draft.sealed() or (
                run(section, inputs, draft, listener) if run else _compute(name, params, inputs, draft, listener, data)
            )
            artefact = artefact.leaving_out(())  # a run that was killed may have rejected some: all are judged again
            if name == "train":
                pictures = _draw_health(artefact, reports.path)
            artefact, report = _gate(name, artefact, params, inputs.get("train", artefact), draft, reports, must_pass)
            _tell_rejected(name, artefact, place, on_event)
            if name == "catalog":
                report.append(_write_report(artefact, reports.path))
            if runs:
                runs.finish(artefact)
        published = draft.publish(place)
        if name in TRACKED or name == "catalog":
            _track(name, inputs.get("train", published), published, report, pictures, reports.path)
    return published


def _tell_rejected(name: str, artefact: Artefact, place: Folder, on_event: Listener) -> None:
    for sae, reason in artefact.rejected.items():
        on_event(Warned(f"{name}: {sae} is rejected: {reason}; it is kept in {place / sae}, and no later stage reads it"))


@dataclass(frozen=True)
class _Reports:
    """The folder of the gates' reports."""

    path: Path
    """On this machine."""
    shown: str
    """Where a user finds it."""


@contextmanager
def _open_reports(name: str, data: str) -> Iterator[_Reports]:
    """The reports of a data root; of one in an object store, a folder on this machine that goes there when the block ends."""
    there = open_folder(data) / QUALITY.name
    # training hands on the reports of what came before, and replaces the pictures of SAEs of the training before
    earlier = [file.name for file in _earlier_reports(Path())] if name == "train" else []
    with there.mirror(earlier, replace=HEALTH) as path:
        yield _Reports(path, f"{path.absolute()}" if there.is_local else there.url)


def _earlier_reports(reports: Path) -> list[Path]:
    """Of the stages before training, which know no MLflow run."""
    return [reports / f"{earlier}{suffix}" for earlier in ("images", "extract") for suffix in (".json", ".html")]


def study_params(name: str, params: Params, data: str, on_event: Listener = ignore) -> Params:
    """The params of a stage in a study: its own section as given, those before it as the artefacts there were made.

    In the checkout's own root DVC sees to that, and they are left as they are. What differs from what was given is told.

    Args:
        name: The stage.
        params: As params.yaml and the command line give them.
        data: Root of the artefacts, a path or URL.
        on_event: Hears what differs.
    """
    if _is_checkouts(data):
        return params
    sections: dict[str, Any] = {}
    for other in STAGES[name].inputs:
        given: Section = getattr(params, other)
        try:
            made = store.open_artefact(_place(other, data), STAGES[other].kind).manifest.params
        except ArtefactError:
            continue  # the stage says so, if it needs it
        if other != "label" and made != given.identity():
            kept = {key: value for key, value in given.model_dump(mode="json").items() if key in given.how and key not in made}
            sections[other] = {**kept, **made}
    if not sections:
        return params
    values = params.model_dump(mode="json")
    studied = make_params({**values, **sections}, f"{open_folder(data)}")
    told = {key: value for key, value in dotted(studied).items() if dotted(params).get(key, _ABSENT) != value}
    if told:
        changes = ", ".join(f"{key}={value}" for key, value in list(told.items())[:5])
        more = f" and {len(told) - 5} more" if len(told) > 5 else ""
        on_event(Warned(f"{open_folder(data)} was made with {changes}{more}: {name} goes by these, not by what was given"))
    return studied


_ABSENT = object()


def _is_checkouts(data: str) -> bool:
    """Whether a root is that of the checkout, which DVC knows."""
    path = open_folder(data).local_path()
    return path is not None and path.resolve() == Path(DATA).resolve()


def follow_training(params: Params, data: str = DATA) -> None:
    """Train beside the process that runs the stage, which alone writes: for all but the first of those that `torchrun` starts.

    Raises:
        OmmatidError: an input is missing or damaged, or training cannot go on.
    """
    from ommatid.train.stage import follow

    follow(params.train, _open_inputs("train", params, data))


def _open_inputs(name: str, params: Params, data: str) -> dict[str, Artefact]:
    """What a stage reads; activations from files are made of no other artefact.

    Raises:
        ArtefactError: an input is missing or damaged, was imported and lacks what this stage needs, or was made from others than these.
    """
    stages = STAGES[name].inputs
    if name == "extract" and isinstance(params.extract, ExtractFiles):
        return {}
    inputs = _open_activations(name, params, data) if "extract" in stages else {}
    if inputs and "images" in stages and inputs["extract"].summary.get("source") == "files":
        raise ArtefactError(
            f"{inputs['extract'].url}: {name} needs images and a judge's embeddings of them, and these activations were imported from "
            f"files that carry neither; the SAE is finished without {name}; to have it, set extract.source: images, with the images and "
            "the model that they came from, and run the stages from images on"
        )
    inputs |= {other: open_stage(other, params.hookpoint, data) for other in stages if other != "extract"}
    _check_lineage(name, inputs)
    return _passed(inputs)


def _check_lineage(name: str, inputs: Mapping[str, Artefact]) -> None:
    """Check that the inputs of a stage belong together: each was made from those of the others that it names.

    Raises:
        ArtefactError: an artefact was made again, and one made from what it held before was not.
    """
    stale = {
        f"{artefact.url} was made from another {source.url}": stage
        for stage, artefact in inputs.items()
        for made_from, digest in artefact.manifest.inputs.items()
        if made_from != stage and (source := inputs.get(made_from)) and source.digest != digest  # a sample of images names the whole
    }
    if stale:
        again = [stage for stage in STAGES if stage in stale.values()]
        raise ArtefactError(
            f"{name}: its inputs do not belong together: {'; '.join(stale)} than is there now; "
            f"run `dvc repro {name}`, or these stages again, in this order: {', '.join([*again, name])}"
        )


def _passed(inputs: Mapping[str, Artefact]) -> dict[str, Artefact]:
    """The inputs without the SAEs that the gate of any of their stages rejected."""
    rejected = {sae for stage in inputs.keys() & TRACKED for sae in inputs[stage].rejected}
    return {stage: artefact.leaving_out(rejected) if stage in TRACKED else artefact for stage, artefact in inputs.items()}


def _open_activations(name: str, params: Params, data: str) -> dict[str, Artefact]:
    """`extract`: what is encoded; and for those that decode something else, `target`."""
    activations = open_stage("extract", params.hookpoint, data)
    if params.train.target is None or name not in DECODING:
        return {"extract": activations}
    target = open_stage("extract", params.train.target, data)
    _check_pair(activations, target)
    return {"extract": activations, "target": target}


def _check_pair(activations: Artefact, target: Artefact) -> None:
    """Whether the rows of two hookpoints are of the same tokens, in the same order.

    Raises:
        ArtefactError: they are not.
    """
    one, other = activations.summary, target.summary
    differing = [f"{key} {one[key]} and {other[key]}" for key in ("tokens_per_image", "grid") if one[key] != other[key]]
    if activations.manifest.params.get("max_norm") is not None:
        differing.append("extract.max_norm left out other tokens of each")
    if differing:
        raise ArtefactError(
            f"train.target: {other['hookpoint']} cannot be reconstructed from {one['hookpoint']}, their tokens are not the same: "
            f"{'; '.join(differing)}; name a hookpoint with the same tokens, and extract with max_norm: null"
        )


def _training_runs(name: str, params: Params, inputs: dict[str, Artefact], data: str) -> AbstractContextManager["Runs | None"]:
    """The MLflow runs that training is recorded in; they fail with the gate."""
    if name != "train":
        return nullcontext()
    from ommatid import tracking

    return tracking.training_runs(params, inputs, _is_checkouts(data))


def _gate(
    name: str, artefact: Artefact, params: Params, training: Artefact, draft: Draft, reports: _Reports, must_pass: bool
) -> tuple[Artefact, list[Path]]:
    """Check the artefact; gives what of it passed, and the report's files. What fails as a whole, and must not, is discarded."""
    # what each SAE was made by stands in its manifest: params may have been overridden for the training alone
    saes = {own: TrainParams.model_validate(sae.manifest.params) for own, sae in training.each().items()} if name in TRACKED else {}
    report = quality.check(name, artefact, params, saes)
    json_path, html_path = quality.write_report(report, reports.path)
    if must_pass and report.rejected:
        artefact = draft.reseal(artefact, _without(artefact.summary, report.rejected))
    elif must_pass and not report.success:
        draft.discard()
        failures = "; ".join(f"{check.title}: {check.detail}" for check in report.failures)
        raise GateError(f"{name}: quality gate failed: {failures}; nothing was published; the report is {reports.shown}/{html_path.name}")
    return artefact, [json_path, html_path]


def _without(summary: Mapping[str, Any], rejected: Mapping[str, str]) -> dict[str, Any]:
    """The summary of a stage's SAEs once some are rejected."""
    passed = {sae: numbers for sae, numbers in summary["of"].items() if sae not in rejected}
    return {**summary, "saes": list(passed), "of": passed, "rejected": dict(rejected)}


def _draw_health(training: Artefact, reports: Path) -> dict[str, list[Path]]:
    """A picture of each dictionary; also of one that then fails the gate, for it shows why."""
    from ommatid.show.health import draw_health

    folder = reports / HEALTH
    shutil.rmtree(folder, ignore_errors=True)  # SAEs of the training before
    drawn = {}
    for name, sae in training.each().items():
        draw_health(sae, name, folder / f"{name}.png")
        drawn[name] = [folder / f"{name}.png"]
    return drawn


def _write_report(catalog: Artefact, reports: Path) -> Path:
    from ommatid.catalog.reader import Catalog
    from ommatid.show.report import write_report

    with Catalog(catalog.file("catalog.duckdb")) as opened:
        write_report(opened, reports / REPORT)
    return reports / REPORT


def _track(
    name: str, training: Artefact, artefact: Artefact, report: list[Path], pictures: Mapping[str, list[Path]], reports: Path
) -> None:
    """Numbers and reports go to the MLflow run of each SAE; the training takes along the reports of what came before."""
    from ommatid import tracking

    if name == "train":
        report = [*(path for path in _earlier_reports(reports) if path.exists()), *report]
    made = artefact.leaving_out(()).each()  # nothing inside a catalogue: it is about all of them
    numbers = {sae: _numbers(made[sae].summary) if made else {} for sae in training.children}
    tracking.log_stage(name, training.each(), report, numbers, pictures, artefact.rejected)


def _numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in summary.items() if isinstance(value, int | float)}


def _compute(name: str, params: Params, inputs: dict[str, Artefact], draft: Draft, on_event: Listener, data: str) -> Artefact:
    match name:
        case "images":
            from ommatid.images import make_images

            return make_images(params.images, inputs, draft, on_event)
        case "extract":
            return _extract(params.extract, inputs, draft, on_event)
        case "train":
            from ommatid.train.stage import train

            return train(params.train, inputs, draft, on_event)
        case "evaluate":
            from ommatid.evaluate.matches import write_matches
            from ommatid.evaluate.stage import evaluate

            each = functools.partial(evaluate, params.evaluate)
            return _for_each_sae(each, inputs, draft, on_event, lambda made: write_matches(inputs["train"].each(), made, draft, on_event))
        case "label":
            from ommatid.label import label, load_material

            material = functools.cache(lambda: load_material(params.label, inputs, on_event))  # only where an SAE is not labelled yet
            return _for_each_sae(lambda own, child, tell: label(params.label, own, child, tell, material()), inputs, draft, on_event)
        case "catalog":
            from ommatid import tracking
            from ommatid.catalog.build import build_catalog

            lineage = tracking.lineage(inputs["train"].each(), _is_checkouts(data))
            return build_catalog(params.catalog, inputs, draft, lineage, on_event)
        case _:
            raise AssertionError(f"no stage {name!r}")


def _for_each_sae(
    make: Callable[[Mapping[str, Artefact], Draft, Listener], Artefact],
    inputs: Mapping[str, Artefact],
    draft: Draft,
    on_event: Listener,
    compare: Callable[[Mapping[str, Artefact]], None] = lambda made: None,
) -> Artefact:
    """Run a stage for every SAE of the training, into an artefact inside each; what a run that died has sealed is kept.

    Args:
        make: Makes it for one SAE, from its own artefacts of the stages before.
        inputs: Of the stage.
        draft: Of the stage.
        on_event: Hears which SAE it is about where there are several.
        compare: Then writes what is about several of them, from what was made of each.
    """
    names = inputs["train"].children
    made: dict[str, Artefact] = {}
    for name in names:
        own = {
            stage: artefact.child(name, INSIDE[artefact.manifest.kind]) if stage in TRACKED else artefact
            for stage, artefact in inputs.items()
        }
        child = draft.child(name, INSIDE[draft.kind], inputs=own)
        made[name] = child.sealed() or make(own, child, about(name, len(names) == 1, on_event))
    compare(made)
    return draft.seal({"saes": names, "of": {name: _numbers(artefact.summary) for name, artefact in made.items()}})


def _extract(params: ExtractParams | ExtractFiles, inputs: dict[str, Artefact], draft: Draft, on_event: Listener) -> Artefact:
    match params:
        case ExtractParams():
            from ommatid.extract.stage import extract

            return extract(params, inputs, draft, on_event)
        case ExtractFiles():
            from ommatid.extract.from_files.stage import import_files

            return import_files(params, inputs, draft, on_event)
        case _:
            assert_never(params)
