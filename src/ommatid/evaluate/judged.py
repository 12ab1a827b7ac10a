"""MonoSemanticity scores of a dictionary by every judge, and the table `judged`."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ommatid import schemas
from ommatid.errors import ArtefactError
from ommatid.metrics import Monosemanticity, MonosemanticityInterval, MonosemanticityScores, nan_mean
from ommatid.store import Artefact

WAITING = 2**21
"""Image-level activations (images x latents) that are added together: a pass over Σap then serves many images."""
IMAGES = 2048
"""Images that are added together, at most."""


@dataclass(frozen=True)
class Judge:
    """What the activations' summary says of a judge."""

    name: str
    """What the user would call it."""
    width: int
    """Of its embeddings."""

    @classmethod
    def all_of(cls, activations: Artefact) -> "list[Judge]":
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
    def headline(self) -> dict[str, Any]:
        """Numbers of the whole dictionary, as `comparisons` has them; None where there is none."""
        undefined = int(self.ms.isnan().sum())
        best = float(self.ms.nan_to_num(-math.inf).max()) if undefined < len(self.ms) else math.nan
        low, high = self.of_mean
        numbers = {"ms": nan_mean(self.ms), "ms_low": low, "ms_high": high, "ms_best": best, "ms_floor": self.floor}
        known = {name: None if math.isnan(value) else value for name, value in numbers.items()}
        return {**known, "ms_left_out": undefined, "judge": self.judge}


class Judged:
    """Scores of one dictionary by every judge, in two passes over the same images.

    An image that a judge failed on, whose embedding is not finite, takes no part in this judge's scores.
    """

    def __init__(self, n_latents: int, judges: Sequence[Judge]) -> None:
        self._judges = judges
        self._first = [Monosemanticity(n_latents, judge.width) for judge in judges]
        self._second: list[MonosemanticityInterval] = []
        self._scores: list[MonosemanticityScores] = []
        self._n_images = 0
        self._failed = [0] * len(judges)
        n = max(1, min(IMAGES, WAITING // n_latents))
        self._waiting = [torch.empty(n, width) for width in (n_latents, *(judge.width for judge in judges))]  # kept: see `Firings`
        self._n_waiting = 0

    def add(self, acts_bs: Tensor, judges: Sequence[Tensor]) -> None:
        """Image-level activations (images, latents), and the embeddings of these images by each judge (images, width)."""
        start, most = 0, len(self._waiting[0])
        while start < len(acts_bs):
            n = min(len(acts_bs) - start, most - self._n_waiting)
            for waiting, new in zip(self._waiting, (acts_bs, *judges), strict=True):
                waiting[self._n_waiting : self._n_waiting + n] = new[start : start + n]
            start, self._n_waiting = start + n, self._n_waiting + n
            if self._n_waiting == most:
                self._flush()

    def begin_second_pass(self) -> None:
        """After the first.

        Raises:
            ArtefactError: a judge failed on every image.
        """
        self._flush()
        for judge, scores, failed in zip(self._judges, self._first, self._failed, strict=True):
            if not scores.n and failed:
                raise ArtefactError(
                    f"evaluate: the judge {judge.name} gave no embedding of any of the {failed} evaluation images; set extract.judge to "
                    "another encoder, or extract.dtype to float32, and extract again"
                )
        self._scores = [scores.scores() for scores in self._first]
        self._second = [MonosemanticityInterval(scores) for scores in self._first]
        self._first = []  # of no more use, and large

    def verdicts(self) -> list[Verdict]:
        """After the second pass: what each judge says, the main one first."""
        self._flush()
        return [
            Verdict(judge.name, scores.ms, *interval.of_latents(), interval.of_mean(), scores.floor, self._n_images - failed, failed)
            for judge, scores, interval, failed in zip(self._judges, self._scores, self._second, self._failed, strict=True)
        ]

    def _flush(self) -> None:
        acts, *judges = (waiting[: self._n_waiting] for waiting in self._waiting)
        self._n_images += len(acts) if self._first else 0
        for i, (embeddings, of_judge) in enumerate(zip(judges, self._first or self._second, strict=True)):
            has = embeddings.isfinite().all(1) & (embeddings != 0).any(1)
            if self._first:
                self._failed[i] += int((~has).sum())
            of_judge.add(*((acts, embeddings) if bool(has.all()) else (acts[has], embeddings[has])))
        self._n_waiting = 0


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
        **{
            name: pa.array(x.numpy(), pa.float64(), from_pandas=True)
            for name, x in (("ms", verdict.ms), ("ms_low", verdict.low), ("ms_high", verdict.high))
        },
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
