"""A check of new images for drift from end to end: find the champion, compare, pass the gate, and publish what was found.

    data/published/champions/<key>/drift/   what the champion keeps to be compared with
    data/published/drift/<check>/           a check; the published catalogue has the newest in the relations drift_checks, drift and
                                            drift_images
    data/quality/drift.html, drift.json     the gate's report on the last check

All paths are relative to the current directory.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock

from ommatid import quality, store
from ommatid.catalog.reader import Catalog
from ommatid.config import Params
from ommatid.config.evaluate import ImageActivation
from ommatid.drift import Champion, Check, Extraction, Reference, check, open_reference, write_reference
from ommatid.errors import ArtefactError, GateError, QueryError
from ommatid.events import Listener, Warned, ignore
from ommatid.pipeline import open_stage
from ommatid.publish.champion import CATALOG, CHECKS, REFERENCE, WORK, folder_of, open_extraction, read_images, settle
from ommatid.publish.decisions import find_champion
from ommatid.stage import QUALITY

LEAST_KNOWN = 0.5
"""Least share of a champion's images that must still be there for a reference to be made afterwards."""


class DriftError(GateError):
    """New images differ from the champion's, and `drift.action` is `stop`; nothing was trained."""


@dataclass(frozen=True)
class Outcome:
    """What a check came to."""

    check: Check | None
    """The check; None if there was nothing to compare, or nothing to compare with."""
    reason: str
    """Sentence that says what was found, or why nothing was compared."""
    is_drift: bool = False
    """Whether new images differ by more than the thresholds allow."""

    @property
    def verdict(self) -> str:
        """Verdict of the check; `nothing` if there is none."""
        return self.check.verdict if self.check else "nothing"


def check_drift(params: Params, on_event: Listener = ignore) -> Outcome:
    """Compare the checkout's new images with the champion's, before a training on them begins.

    Args:
        params: All params.
        on_event: Called with each progress event.

    Returns:
        The outcome, which is published. Nothing is compared without a champion, without new images, and with a champion that has no
        reference and whose images are gone.

    Raises:
        ArtefactError: The images or activations are missing or damaged.
    """
    decision = find_champion()
    if decision is None:
        return Outcome(None, "there is no champion yet that new images could be compared with")
    folder = folder_of(decision)
    for stage in ("images", "extract"):  # these errors are about the checkout, and all others about the champion
        open_stage(stage)
    with _locked(folder):
        try:
            extraction = open_extraction(store.open_artefact(folder / "sae", "sae"))
            known = _open_champion(folder, extraction, on_event)
        except (ArtefactError, QueryError) as error:
            on_event(Warned(reason := f"new images are not compared: {error}"))
            return Outcome(None, reason)
        found = check(params.drift, CHECKS, known, extraction, on_event)
        if found is None:
            return Outcome(None, f"no images have come in that were not compared with the champion {decision.challenger.sae} before")
        report = quality.check("drift", found.artefact, params, {})
        quality.write_report(report, QUALITY)
    settle(params.retrain.keep, on_event)
    return Outcome(found, found.row["reason"], not report.success)


@contextmanager
def _locked(champion: Path) -> Iterator[None]:
    """Let one process check at a time, and remove what a killed one left."""
    WORK.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(WORK / "drift.lock"):
        for leftover in [*CHECKS.glob("*.tmp"), *champion.glob(f"{REFERENCE}.*.tmp")]:
            shutil.rmtree(leftover)
        yield


def stop_if_drifted(params: Params, outcome: Outcome) -> None:
    """Raise an error if there is drift and `drift.action` is `stop`.

    Raises:
        DriftError: There is; the message says what to do.
    """
    if outcome.is_drift and params.drift.action == "stop":
        raise DriftError(
            f"drift: {outcome.reason}; nothing was trained; look at {QUALITY / 'drift.html'} and at the page /drift of `ommatid serve "
            "--published`, then remove the images that do not belong, or set drift.action to warn to train on them"
        )


def _open_champion(folder: Path, extraction: Extraction, on_event: Listener) -> Champion:
    """Open a champion with its reference, which is made from the images of now if it has none or a damaged one.

    Raises:
        ArtefactError: Its SAE is gone or damaged; or it has no reference, and too few of its images are still there.
        QueryError: It has no reference, and its catalogue cannot be read.
    """
    sae = store.open_artefact(folder / "sae", "sae")
    sae.verify()
    if (reference := _open_reference(folder / REFERENCE, on_event)) is None:
        _make_reference(folder, sae, extraction, on_event)
        reference = open_reference(folder / REFERENCE)
        assert reference is not None, folder
    return Champion(folder.name, sae, reference, folder / CATALOG.name)


def _open_reference(folder: Path, on_event: Listener) -> Reference | None:
    """Open a champion's reference; None if it has none, or a damaged one, which is then said."""
    try:
        if found := open_reference(folder):
            found.artefact.verify()
        return found
    except ArtefactError as error:
        on_event(Warned(f"what new images are compared with is made again, if enough of the champion's own are here: {error}"))
        return None


def _make_reference(folder: Path, sae: store.Artefact, extraction: Extraction, on_event: Listener) -> None:
    """Make a champion's reference from those of its images that are still here, in place of a damaged one.

    Raises:
        ArtefactError: Too few of its images are still there.
        QueryError: Its catalogue cannot be read.
    """
    name, catalog = sae.summary["sae"], folder / CATALOG.name
    known, image_activation = read_images(catalog), _read_image_activation(catalog, name)
    n_here = sum(image_id in known for _, image_id, _ in extraction.rows)
    if n_here < LEAST_KNOWN * len(known):
        raise ArtefactError(
            f"what the champion {name} kept to be compared with is missing or damaged, and only {n_here:,} of its {len(known):,} images "
            f"are here to make {folder / REFERENCE} again; bring that folder back from DVC; the next champion has its own"
        )
    made = folder / f"{REFERENCE}.made.tmp"  # so that the damaged one, which DVC may know, goes only when there is another
    write_reference(made, sae, extraction, image_activation, known, on_event)
    shutil.rmtree(folder / REFERENCE, ignore_errors=True)
    made.rename(folder / REFERENCE)


def _read_image_activation(catalog: Path, name: str) -> ImageActivation:
    """Read how activations of tokens became one for each image from a champion's catalogue."""
    with Catalog(catalog) as opened:
        ((params,),) = opened.rows("SELECT params FROM runs WHERE sae = $sae", {"sae": name})
    return json.loads(params)["evaluate"]["image_activation"]
