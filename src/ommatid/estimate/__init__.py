"""Estimates of what a run will take, before it starts: disk space, time and memory of every stage.

Every stage really runs on small samples of the images, in a process of its own like `ommatid <stage>`, and in a folder that is removed
afterwards (trials.py). A line through the costs of samples of two or more sizes is extrapolated to the whole run (fit.py, totals.py).
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ommatid.config import ExtractFiles, ImagesParams, Params
from ommatid.errors import ArtefactError, ConfigError
from ommatid.estimate.trials import Trials
from ommatid.events import Listener, ignore
from ommatid.pipeline import STAGES, open_stage
from ommatid.stage import DATA
from ommatid.store import Artefact
from ommatid.store.filesystem import nearest_folder, open_folder

__all__ = ["Estimate", "StageEstimate", "estimate"]


@dataclass(frozen=True)
class StageEstimate:
    """Estimate of one stage."""

    stage: str
    """Name of the stage."""
    bytes: int
    """Size of its artefact in bytes."""
    seconds: float | None
    """Seconds that its process takes; None if the artefact exists and will be used."""
    peak: int | None
    """Largest resident set of its process in bytes; None if the artefact exists and will be used."""
    sizes: tuple[int, ...]
    """Numbers of images of the trials from which the estimate was made."""


@dataclass(frozen=True)
class Estimate:
    """Estimate of a run."""

    stages: tuple[StageEstimate, ...]
    """Estimates of the stages, in order."""
    n_images: int
    """Approximate number of images of the run."""
    temporary: int
    """Bytes of disk space that stages need in addition, and free when they end."""
    free: int | None
    """Bytes of free disk space where the artefacts go; None if they go to an object store."""
    took: float
    """Seconds that the estimate itself took."""
    untried: tuple[str, ...]
    """Names of labellers whose cost is unknown: no trial runs them, and the estimate leaves them out."""

    @property
    def bytes(self) -> int:
        """Size of all artefacts in bytes."""
        return sum(stage.bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Seconds that all stages without an artefact take, one after the other."""
        return sum(stage.seconds or 0.0 for stage in self.stages)

    @property
    def peak(self) -> int:
        """Largest resident set, in bytes, of the stage that needs most memory."""
        return max(stage.peak or 0 for stage in self.stages)

    @property
    def missing(self) -> int:
        """Bytes of disk space that the run needs, not counting artefacts that exist; 0 if they go to an object store."""
        return 0 if self.free is None else sum(s.bytes for s in self.stages if s.seconds is not None) + self.temporary


def estimate(params: Params, data: str = DATA, on_event: Listener = ignore) -> Estimate:
    """Run the stages on samples, and estimate what the whole run will take.

    Args:
        params: Params of the run.
        data: Root of the artefacts, a path or URL. The images in it are used if they were made with these params.
        on_event: Called with each progress event and warning.

    Returns:
        The estimate.

    Raises:
        ConfigError: Activations come from files, so there are no images to take samples of.
        OmmatidError: A stage failed on a sample; the error is the stage's own.
    """
    if isinstance(params.extract, ExtractFiles):
        raise ConfigError(
            "extract.source: imports of activations are not estimated; an import reads the files once, and writes about as many bytes as "
            "their values take in float16; run `ommatid extract` to import them, and `ommatid train`, which prints its progress"
        )
    start = time.perf_counter()
    whole = _find_images(params, data)
    n_items = whole.summary["n_images"] if whole else _count_items(params.images)
    with _workspace(data) as root:
        trials = Trials(params, whole, n_items, root, on_event)
        trials.run(lambda images, activations: _train_tokens(images, activations, _images_of(params, whole, images, n_items)))
        return _conclude(params, whole, n_items, trials, data, start)


def _conclude(params: Params, whole: Artefact | None, n_items: int, trials: Trials, data: str, start: float) -> Estimate:
    from ommatid.estimate.totals import Extrapolation  # imported late: it loads torch, whose memory the trials may need

    artefacts = {stage: trials.artefact(stage) for stage in STAGES}
    images = _images_of(params, whole, artefacts["images"], n_items)
    extrapolation = Extrapolation(params, artefacts, trials.activations(), trials.results)
    trial, run = extrapolation.amounts(images)
    sizes, peaks = extrapolation.bytes(trial, run), extrapolation.peaks(trial, run)
    costs, work = extrapolation.costs(trial), extrapolation.work(run, n_items)
    if whole:
        sizes["images"] = sum(file.bytes for file in whole.manifest.files)
    stages = [
        StageEstimate(
            stage,
            sizes[stage],
            costs[stage].seconds(work[stage]) if stage in costs else None,
            peaks.get(stage),
            tuple(sorted(set(trials.results[stage].sizes))),
        )
        for stage in STAGES
    ]
    temporary = extrapolation.temporary(run, sizes["extract"])
    untried = tuple(name for name, one in params.label.each().items() if one.cost == "unknown")
    return Estimate(tuple(stages), round(run.images), temporary, open_folder(data).free_bytes(), time.perf_counter() - start, untried)


def _find_images(params: Params, data: str) -> Artefact | None:
    """Return the images artefact of the run, or None if there is none that was made with these params."""
    try:
        images = open_stage("images", data=data)
    except ArtefactError:
        return None
    return images if images.manifest.params == params.images.identity() else None


def _count_items(params: ImagesParams) -> int:
    from ommatid.images.source import open_source

    total = open_source(params.source).total
    return min(total, params.limit or total)


def _images_of(params: Params, whole: Artefact | None, trial: Artefact, n_items: int) -> dict[str, Any]:
    """Return the numbers of images of the run by split.

    They are counted if the images exist. Otherwise they follow from the share of items that a trial kept, and from `images.eval_share`.
    """
    if whole:
        return whole.summary
    n_images = n_items * trial.summary["n_images"] / max(1, trial.summary["n_seen"])
    n_eval = n_images * params.images.eval_share
    return {"n_images": n_images, "n_train": n_images - n_eval, "n_eval": n_eval}


def _train_tokens(images: Artefact, activations: Artefact, whole: dict[str, Any]) -> float:
    """Return the expected number of training tokens of the run."""
    return activations.rows("train") * whole["n_train"] / max(1, images.summary["n_train"])


@contextmanager
def _workspace(data: str) -> Iterator[Path]:
    """Make a folder on the disk to which the artefacts will go, and remove it at the end."""
    with tempfile.TemporaryDirectory(prefix=".estimate-", dir=_find_folder(data), ignore_cleanup_errors=True) as name:
        yield Path(name)


def _find_folder(data: str) -> Path:
    """Return the data root, or its nearest parent that exists; for an object store, the current folder."""
    return nearest_folder((open_folder(data).local_path() or Path()).absolute())
