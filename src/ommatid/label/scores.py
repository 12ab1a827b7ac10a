"""How far to believe a name: detection and correlation on held-out images, beside names that are not the latent's."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ommatid.halves import Fired, Halves
from ommatid.label.controls import Tried
from ommatid.label.examples import Test, draw_test
from ommatid.label.gathered import Gathered
from ommatid.metrics import auroc, balanced_accuracy, best_threshold, rank_correlation


@dataclass(frozen=True)
class Trial:
    """Images on which all names of a latent are tried."""

    naming: Test
    """They set the threshold."""
    held_out: Test
    """They score."""


@dataclass(frozen=True)
class Scorer:
    """Does the place of a name in the joint space tell the images that fire a latent from those that do not?"""

    images: Tensor
    """Joint embeddings of the evaluation images, (images, d_joint)."""
    halves: Halves
    gathered: Gathered
    seed: int

    def draw(self, fired: Fired) -> Trial | None:
        """Images to try the names of a latent on; None: it fires on all images of a half."""
        rng = np.random.default_rng([self.seed, fired.latent])
        near = self.gathered.near(fired.latent)
        naming, held_out = (draw_test(fired, self.halves, half, near, rng) for half in (False, True))
        return Trial(naming, held_out) if len(naming.negative) and len(held_out.negative) else None

    def score(self, trial: Trial, tried: Tried) -> dict[str, float | None]:
        """Scores of a name and of its controls on the same images: columns of `labels`."""
        naming, held_out = self._gather(trial.naming), self._gather(trial.held_out)
        own = _Cosines.of(naming, held_out, tried.name)
        other, random = (None if name is None else _Cosines.of(naming, held_out, name) for name in (tried.shuffled, tried.random))
        area, low, high = auroc(*own.held_out)
        acts = torch.from_numpy(np.concatenate([trial.held_out.acts, np.zeros(len(trial.held_out.negative))]))
        return {
            "score": own.detect(),
            "auroc": area,
            "auroc_low": low,
            "auroc_high": high,
            "control_score": other and other.detect(),
            "random_score": random and random.detect(),
            "correlation": own.correlate(acts),
            "control_correlation": other and other.correlate(acts),
        }

    def _gather(self, test: Test) -> "Two":
        return self.images[torch.from_numpy(test.positive)], self.images[torch.from_numpy(test.negative)]


Two = tuple[Tensor, Tensor]
"""Of a test's images that fire the latent, and of those that do not."""


@dataclass(frozen=True)
class _Cosines:
    """Cosines of a name to the images of both halves, computed once for all its scores."""

    naming: Two
    held_out: Two

    @classmethod
    def of(cls, naming: Two, held_out: Two, name: Tensor) -> "_Cosines":
        """From the images' embeddings, (images, d_joint) each, and the name's, (d_joint,)."""
        return cls((naming[0] @ name, naming[1] @ name), (held_out[0] @ name, held_out[1] @ name))

    def detect(self) -> float:
        """Balanced accuracy on the held-out images at the threshold that is best on those of the naming half."""
        return balanced_accuracy(*self.held_out, best_threshold(*self.naming))

    def correlate(self, acts: Tensor) -> float | None:
        """Rank correlation with the activations on the held-out images; None where either is constant."""
        found = rank_correlation(torch.cat(self.held_out), acts)
        return None if math.isnan(found) else found


N_DETECTED = 8
"""Held-out images that fire, and as many that do not, of which a detector is asked: each costs a part of a request."""


def draw_detection(test: Test) -> tuple[np.ndarray, int]:
    """Rows for a detector, half of the silent ones hard, and how many of them, the first, fire."""
    positive = test.positive[:N_DETECTED]
    hard = test.hard[: len(positive) // 2]
    return np.concatenate([positive, hard, test.random[: len(positive) - len(hard)]]), len(positive)


def grade(grades: tuple[float, ...], n_firing: int) -> dict[str, float]:
    """Scores of a detector's own grades, 0 to 1, of images of which the first `n_firing` fire: the threshold is one half."""
    positive, negative = torch.tensor(grades[:n_firing]), torch.tensor(grades[n_firing:])
    return {"detector_score": balanced_accuracy(positive, negative, 0.5), "detector_auroc": auroc(positive, negative)[0]}
