"""MonoSemanticity scores of a dictionary by every judge, and the table `judged`."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ommatid import schemas
from ommatid.compute.checkpoint import Accumulator
from ommatid.compute.nulls import none_for_nan, nullable
from ommatid.errors import ArtefactError
from ommatid.metrics import Monosemanticity, MonosemanticityInterval, nan_mean
from ommatid.store import Artefact

WAITING = 2**21
"""Image-level activations (images x latents) that are added together: a pass over Σap then serves many images."""
IMAGES = 2048
"""Images that are added together, at most."""

Scores = TypeVar("Scores", Monosemanticity, MonosemanticityInterval)


@dataclass(frozen=True)
class JudgeSummary:
    """What the activations' summary says of a judge."""

    name: str
    """What the user would call it."""
    width: int
    """Of its embeddings."""

    @classmethod
    def all_of(cls, activations: Artefact) -> "list[JudgeSummary]":
        """The judges behind the embeddings, the main one first."""
        return [cls(judge["judge"], judge["d_judge"]) for judge in activations.summary["judges"]]


@dataclass(frozen=True)
class Verdict:
    """What one judge says of a dictionary."""

    judge: str
    """Its name."""
    ms: Tensor
    """Score of each latent, (latents,); NaN where it is undefined."""
    low: Tensor
    """Lower end of its 95 % interval, (latents,)."""
    high: Tensor
    """Upper end of its 95 % interval, (latents,)."""
    of_mean: tuple[float, float]
    """The 95 % interval of the mean over the latents that have a score."""
    floor: float
    """Score of uniform weights."""
    n_images: int
    """Images behind all of this: those that it did not fail on."""
    failed: int
    """Images that it failed on."""

    @property
    def n_shown(self) -> int:
        """Images in all."""
        return self.n_images + self.failed

    @property
    def headline(self) -> dict[str, Any]:
        """Numbers of the whole dictionary, as `comparisons` has them; None where there is none."""
        undefined = int(self.ms.isnan().sum())
        best = float(self.ms.nan_to_num(-math.inf).max()) if undefined < len(self.ms) else math.nan
        low, high = self.of_mean
        numbers = {"ms": nan_mean(self.ms), "ms_low": low, "ms_high": high, "ms_best": best, "ms_floor": self.floor}
        return {**none_for_nan(numbers), "ms_left_out": undefined, "judge": self.judge}


class Judged(Accumulator):
    """Scores of one dictionary by every judge, in two passes over the same images.

    An image that a judge failed on, whose embedding is not finite, takes no part in this judge's scores.
    """

    STATE = ("first", "second")

    def __init__(self, n_latents: int, judges: Sequence[JudgeSummary]) -> None:
        self._judges = judges
        self._widths = [n_latents, *(judge.width for judge in judges)]
        self.first: _Pass[Monosemanticity] | None = _Pass([Monosemanticity(n_latents, judge.width) for judge in judges], self._widths)
        """Until the second pass begins: it is large, and of no more use then."""
        self.second: _Pass[MonosemanticityInterval] | None = None

    def add(self, acts_bs: Tensor, judges: Sequence[Tensor]) -> None:
        """Image-level activations (images, latents), and the embeddings of these images by each judge (images, width)."""
        now = self.first or self.second
        assert now
        now.add(acts_bs, judges)

    def begin_second_pass(self) -> None:
        """After the first.

        Raises:
            ArtefactError: a judge failed on every image.
        """
        assert self.first
        self.first.flush()
        for judge, failed in zip(self._judges, self.first.failed, strict=True):
            if 0 < failed == self.first.n_images:
                raise ArtefactError(
                    f"evaluate: the judge {judge.name} gave no embedding of any of the {failed} evaluation images; set extract.judge to "
                    "another encoder, or extract.dtype to float32, and extract again"
                )
        self.second = _Pass([MonosemanticityInterval(scores) for scores in self.first.by_judge], self._widths)
        self.first = None

    def verdicts(self) -> list[Verdict]:
        """After the second pass: what each judge says, the main one first."""
        assert self.second
        self.second.flush()
        n = self.second.n_images
        return [
            Verdict(judge.name, interval.ms, *interval.of_latents(), interval.of_mean(), interval.floor, n - failed, failed)
            for judge, interval, failed in zip(self._judges, self.second.by_judge, self.second.failed, strict=True)
        ]


class _Pass(Accumulator, Generic[Scores]):
    """What one pass adds to, and the images that wait to be added."""

    STATE = ("by_judge", "n_images", "failed", "waiting", "n_waiting")

    def __init__(self, by_judge: list[Scores], widths: Sequence[int]) -> None:
        """`widths` are of the activations and of each judge's embeddings."""
        self.by_judge = by_judge
        self.n_images = 0
        self.failed = [0] * len(by_judge)
        n = max(1, min(IMAGES, WAITING // widths[0]))
        self.waiting = [torch.zeros(n, width) for width in widths]  # kept: see `Firings`
        self.n_waiting = 0

    def add(self, acts_bs: Tensor, judges: Sequence[Tensor]) -> None:
        start, most = 0, len(self.waiting[0])
        while start < len(acts_bs):
            n = min(len(acts_bs) - start, most - self.n_waiting)
            for waiting, new in zip(self.waiting, (acts_bs, *judges), strict=True):
                waiting[self.n_waiting : self.n_waiting + n] = new[start : start + n]
            start, self.n_waiting = start + n, self.n_waiting + n
            if self.n_waiting == most:
                self.flush()

    def flush(self) -> None:
        """Add what waits."""
        acts, *judges = (waiting[: self.n_waiting] for waiting in self.waiting)
        self.n_images += len(acts)
        for i, (embeddings, scores) in enumerate(zip(judges, self.by_judge, strict=True)):
            has = embeddings.isfinite().all(1) & (embeddings != 0).any(1)
            self.failed[i] += int((~has).sum())
            scores.add(*((acts, embeddings) if bool(has.all()) else (acts[has], embeddings[has])))
        self.n_waiting = 0


def make_judged(sae: str, verdicts: Iterable[tuple[str, Verdict]]) -> pa.Table:
    """The `judged` table of an SAE: verdicts on dictionaries by their names."""
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
    """A sentence for each judge that failed on some images."""
    for verdict in verdicts:
        if verdict.failed:
            yield (
                f"the judge {verdict.judge} gave no embedding of {verdict.failed} evaluation images; its scores are of the "
                f"other {verdict.n_images}"
            )
