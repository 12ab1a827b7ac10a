"""What a run will take, before it: bytes, minutes and memory of every stage.

Every stage runs for real on small samples of the images, in a process of its own as `ommatid <stage>` runs it, in a folder that is
removed afterwards (trials.py). Two sizes and more give a line, which is followed to the whole (fit.py, totals.py).
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
    """What one stage will take."""

    stage: str
    bytes: int
    """Of its artefact."""
    seconds: float | None
    """Of the whole process; None: the artefact is there, and is used."""
    peak: int | None
    """Largest resident set in bytes; None likewise."""
    sizes: tuple[int, ...]
    """Images of the trials behind it."""


@dataclass(frozen=True)
class Estimate:
    """What a run will take."""

    stages: tuple[StageEstimate, ...]
    """In order."""
    n_images: int
    """Images of the run, about."""
    while_running: int
    """Bytes on the disk that stages need besides, and give back."""
    free: int | None
    """Bytes free where the artefacts go; None: in an object store."""
    took: float
    """Seconds that the estimate itself took."""
    untried: tuple[str, ...]
    """Labellers that no trial asks, and of which nothing is in the numbers."""

    @property
    def bytes(self) -> int:
        """Of all artefacts."""
        return sum(stage.bytes for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of all stages that are not there yet, one after the other."""
        return sum(stage.seconds or 0.0 for stage in self.stages)

    @property
    def peak(self) -> int:
        """Of the stage that needs most memory."""
        return max(stage.peak or 0 for stage in self.stages)

    @property
    def missing(self) -> int:
        """Bytes that the disk must have for what is not there yet; 0 in an object store."""
        return 0 if self.free is None else sum(s.bytes for s in self.stages if s.seconds is not None) + self.while_running


def estimate(params: Params, data: str = DATA, on_event: Listener = ignore) -> Estimate:
    """Try the stages on samples, and say what the whole will take.

    Args:
        params: Of the run.
        data: Root of the artefacts, a path or URL. Images that were made there by these params are used.
        on_event: Hears of the trials.

    Raises:
        ConfigError: activations come from files.
        OmmatidError: what a stage says to these params, on the first sample on which it does.
    """
    if isinstance(params.extract, ExtractFiles):
        raise ConfigError(
            "extract.source: what an import takes is not estimated: it writes about as many bytes as the files' values take in float16, "
            "and reads them once; `ommatid extract` imports them, and `ommatid train` prints how far it is"
        )
    start = time.perf_counter()
    whole = _find_images(params, data)
    n_items = whole.summary["n_images"] if whole else _count_items(params.images)
    with _workplace(data) as root:
        trials = Trials(params, whole, n_items, root, on_event)
        trials.run(lambda images, activations: _train_tokens(images, activations, _images_of(params, whole, images, n_items)))
        return _conclude(params, whole, n_items, trials, data, start)


def _conclude(params: Params, whole: Artefact | None, n_items: int, trials: Trials, data: str, start: float) -> Estimate:
    from ommatid.estimate.totals import Whole  # torch is loaded here: not beside the trials

    artefacts = {stage: trials.artefact(stage) for stage in STAGES}
    images = _images_of(params, whole, artefacts["images"], n_items)
    seen = Whole(params, artefacts, trials.activations(), trials.tried)
    trial, all_ = seen.amounts(images)
    sizes, costs, work, peaks = seen.bytes(trial, all_), seen.costs(trial), seen.work(all_, n_items), seen.peaks(trial, all_)
    if whole:
        sizes["images"] = sum(file.bytes for file in whole.manifest.files)
    stages = [
        StageEstimate(
            stage,
            sizes[stage],
            costs[stage].seconds(work[stage]) if stage in costs else None,
            peaks.get(stage),
            tuple(sorted(set(trials.tried[stage].sizes))),
        )
        for stage in STAGES
    ]
    running = seen.while_running(all_, sizes["extract"])
    untried = tuple(name for name, one in params.label.each().items() if one.cost == "unknown")
    return Estimate(tuple(stages), round(all_.images), running, open_folder(data).free_bytes(), time.perf_counter() - start, untried)


def _find_images(params: Params, data: str) -> Artefact | None:
    """The images that these params made, if they are there."""
    try:
        images = open_stage("images", data=data)
    except ArtefactError:
        return None
    return images if images.manifest.params == params.images.identity() else None


def _count_items(params: ImagesParams) -> int:
    from ommatid.images.stage import open_source

    total = open_source(params.source).total
    return min(total, params.limit or total)


def _images_of(params: Params, whole: Artefact | None, trial: Artefact, n_items: int) -> dict[str, Any]:
    """Images of the whole by split: counted, or by the share that a trial kept and the share that params ask for."""
    if whole:
        return whole.summary
    n_images = n_items * trial.summary["n_images"] / max(1, trial.summary["n_seen"])
    n_eval = n_images * params.images.eval_share
    return {"n_images": n_images, "n_train": n_images - n_eval, "n_eval": n_eval}


def _train_tokens(images: Artefact, activations: Artefact, whole: dict[str, Any]) -> float:
    """Training tokens of the whole."""
    return activations.rows("train") * whole["n_train"] / max(1, images.summary["n_train"])


@contextmanager
def _workplace(data: str) -> Iterator[Path]:
    """A folder on the disk where the artefacts will be; nothing is left of it."""
    with tempfile.TemporaryDirectory(prefix=".estimate-", dir=_nearest(data), ignore_cleanup_errors=True) as name:
        yield Path(name)


def _nearest(data: str) -> Path:
    """The folder of the artefacts, or the nearest above that is there; of an object store, the current one."""
    return nearest_folder((open_folder(data).local_path() or Path()).absolute())
