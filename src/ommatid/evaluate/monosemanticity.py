"""MonoSemanticity scores of a dictionary by every judge, and the table `judged`."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from ommatid import schemas
from ommatid.compute.checkpoint import Accumulator
from ommatid.compute.undefined import none_for_nan, nullable
from ommatid.errors import ArtefactError
from ommatid.evaluate.batches import iter_image_activations
from ommatid.events import Listener, Progress, ignore
from ommatid.metrics import Monosemanticity, MonosemanticityInterval, nan_mean
from ommatid.store import Artefact

WAITING = 2**21
"""Number of image-level activations (images x latents) that are collected before they are added. Σap is large: one pass over it
then serves many images."""
IMAGES = 2048
"""Maximum number of images that are collected before they are added."""

Scores = TypeVar("Scores", Monosemanticity, MonosemanticityInterval)


@dataclass(frozen=True)
class JudgeSummary:
    """A judge as the summary of the activations describes it."""

    name: str
    """Name of the judge, as the user knows it."""
    width: int
    """Width of its embeddings."""

    @classmethod
    def all_of(cls, activations: Artefact) -> "list[JudgeSummary]":
        """Return all judges whose embeddings lie beside the activations, the main one first."""
        return [cls(judge["judge"], judge["d_judge"]) for judge in activations.summary["judges"]]


@dataclass(frozen=True)
class Verdict:
    """MonoSemanticity scores (MS) of one dictionary by one judge."""

    judge: str
    """Name of the judge."""
    ms: Float64[Tensor, " latents"]
    """Score of each latent, (latents,); NaN where undefined."""
    low: Float64[Tensor, " latents"]
    """Lower end of each score's 95 % interval, (latents,)."""
    high: Float64[Tensor, " latents"]
    """Upper end of each score's 95 % interval, (latents,)."""
    of_mean: tuple[float, float]
    """95 % interval of the mean over the latents that have a score."""
    floor: float
    """Score of uniform weights: the mean pairwise cosine of the judge's embeddings."""
    n_images: int
    """Number of images that the judge embedded, to which the scores refer."""
    failed: int
    """Number of images on which the judge failed."""

    @property
    def n_shown(self) -> int:
        """Number of images that the judge was shown."""
        return self.n_images + self.failed

    @property
    def headline(self) -> dict[str, Any]:
        """Numbers of the whole dictionary, in columns of the table `comparisons`; None where undefined."""
        undefined = int(self.ms.isnan().sum())
        best = float(self.ms.nan_to_num(-math.inf).max()) if undefined < len(self.ms) else math.nan
        low, high = self.of_mean
        numbers = {"ms": nan_mean(self.ms), "ms_low": low, "ms_high": high, "ms_best": best, "ms_floor": self.floor}
        return {**none_for_nan(numbers), "ms_left_out": undefined, "judge": self.judge}


class JudgeScores(Accumulator):
    """Scores of one dictionary by every judge, accumulated in two passes over the same images.

    An image on which a judge failed, so that its embedding is zero or not finite, is left out of this judge's scores.
    """

    STATE = ("first", "second")

    def __init__(self, n_latents: int, judges: Sequence[JudgeSummary]) -> None:
        self._judges = judges
        self._widths = [n_latents, *(judge.width for judge in judges)]
        self.first: _Pass[Monosemanticity] | None = _Pass([Monosemanticity(n_latents, judge.width) for judge in judges], self._widths)
        """State of the first pass. It is large, so it is dropped when the second pass begins."""
        self.second: _Pass[MonosemanticityInterval] | None = None

    def add(self, acts_bs: Float32[Tensor, "images latents"], judges: Sequence[Float32[Tensor, "images _d_judge"]]) -> None:
        """Add a batch of images to the current pass.

        Args:
            acts_bs: Image-level activations, (images, latents).
            judges: Embeddings of the images by each judge, (images, width).
        """
        current = self.first or self.second
        assert current
        current.add(acts_bs, judges)

    def begin_second_pass(self) -> None:
        """End the first pass and begin the second.

        Raises:
            ArtefactError: A judge failed on every image.
        """
        assert self.first
        self.first.flush()
        for judge, failed in zip(self._judges, self.first.failed, strict=True):
            if 0 < failed == self.first.n_images:
                raise ArtefactError(
                    f"evaluate: the judge {judge.name} gave no embedding for any of the {failed} evaluation images; set "
                    "extract.judge to another encoder, or extract.dtype to float32, and extract again"
                )
        self.second = _Pass([MonosemanticityInterval(scores) for scores in self.first.by_judge], self._widths)
        self.first = None

    def verdicts(self) -> list[Verdict]:
        """End the second pass, and return the verdict of each judge, the main one first."""
        assert self.second
        self.second.flush()
        n = self.second.n_images
        return [
            Verdict(judge.name, interval.ms, *interval.of_latents(), interval.of_mean(), interval.floor, n - failed, failed)
            for judge, interval, failed in zip(self._judges, self.second.by_judge, self.second.failed, strict=True)
        ]


def judge_firings(evaluation: Artefact, activations: Artefact, judges: Sequence[str], on_event: Listener = ignore) -> list[Verdict]:
    """Score an SAE by judges that its evaluation has not seen, from its firings: the same numbers as from its activations.

    Args:
        evaluation: Evaluation of the SAE.
        activations: Activations of the same images, with embeddings by the judges.
        judges: Names of the judges.
        on_event: Called with each progress event.

    Returns:
        The verdict of each judge, in the order of the activations.

    Raises:
        ArtefactError: A judge failed on every image.
    """
    chosen = [judge for judge in JudgeSummary.all_of(activations) if judge.name in judges]
    scores, n = JudgeScores(evaluation.summary["n_latents"], chosen), evaluation.summary["n_images"]
    for is_second in (False, True):
        done = 0
        for acts, embeddings in iter_image_activations(evaluation, activations, [judge.name for judge in chosen]):
            scores.add(acts, embeddings)
            done += len(acts)
            on_event(Progress(f"judge firings, {'second' if is_second else 'first'} pass", done, n))
        if not is_second:
            scores.begin_second_pass()
    return scores.verdicts()


class _Pass(Accumulator, Generic[Scores]):
    """State of one pass: each judge's scores so far, and images that are still to be added to them."""

    STATE = ("by_judge", "n_images", "failed", "waiting", "n_waiting")

    def __init__(self, by_judge: list[Scores], widths: Sequence[int]) -> None:
        """Begin a pass; `widths` are those of the activations and of each judge's embeddings."""
        self.by_judge = by_judge
        self.n_images = 0
        self.failed = [0] * len(by_judge)
        n = max(1, min(IMAGES, WAITING // widths[0]))
        self.waiting = [torch.zeros(n, width) for width in widths]  # allocated once, for the reason given in `Firings`
        self.n_waiting = 0

    def add(self, acts_bs: Float32[Tensor, "images latents"], judges: Sequence[Float32[Tensor, "images _d_judge"]]) -> None:
        """Collect a batch of images, and add what has been collected whenever it is enough."""
        start, most = 0, len(self.waiting[0])
        while start < len(acts_bs):
            n = min(len(acts_bs) - start, most - self.n_waiting)
            for waiting, new in zip(self.waiting, (acts_bs, *judges), strict=True):
                waiting[self.n_waiting : self.n_waiting + n] = new[start : start + n]
            start, self.n_waiting = start + n, self.n_waiting + n
            if self.n_waiting == most:
                self.flush()

    def flush(self) -> None:
        """Add the images that have been collected."""
        acts, *judges = (waiting[: self.n_waiting] for waiting in self.waiting)
        self.n_images += len(acts)
        for i, (embeddings, scores) in enumerate(zip(judges, self.by_judge, strict=True)):
            is_valid = embeddings.isfinite().all(1) & (embeddings != 0).any(1)
            self.failed[i] += int((~is_valid).sum())
            scores.add(*((acts, embeddings) if bool(is_valid.all()) else (acts[is_valid], embeddings[is_valid])))
        self.n_waiting = 0


def make_judged(sae: str, verdicts: Iterable[tuple[str, Verdict]]) -> pa.Table:
    """Make the table `judged` of an SAE.

    Args:
        sae: Name of the SAE.
        verdicts: Pairs of a dictionary's name and a verdict on it.

    Returns:
        The table, one row for each dictionary, latent and judge.
    """
    return pa.concat_tables(_rows(sae, dictionary, verdict) for dictionary, verdict in verdicts)


def _rows(sae: str, dictionary: str, verdict: Verdict) -> pa.Table:
    n = len(verdict.ms)
    columns = {
        "sae": pa.array([sae] * n, pa.string()),
        "dictionary": pa.array([dictionary] * n, pa.string()),
        "latent": pa.array(np.arange(n), pa.int32()),
        "judge": pa.array([verdict.judge] * n, pa.string()),
        **{name: nullable(x) for name, x in (("ms", verdict.ms), ("ms_low", verdict.low), ("ms_high", verdict.high))},
        "floor": pa.array(np.full(n, verdict.floor), pa.float64(), from_pandas=True),
    }
    return pa.table(columns, schema=schemas.JUDGED)


def iter_failures(verdicts: Iterable[Verdict]) -> Iterator[str]:
    """Yield a sentence about each judge that failed on some images."""
    for verdict in verdicts:
        if verdict.failed:
            yield (
                f"the judge {verdict.judge} gave no embedding for {verdict.failed} evaluation images; its scores are of the "
                f"remaining {verdict.n_images}"
            )
