"""How far to believe a name: detection and correlation on held-out images, beside names that are not the latent's."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ommatid.events import Listener, Progress, ignore
from ommatid.images.eval_split import EvalSplit, LatentFirings
from ommatid.label.evidence import Gathered, Test, draw_test
from ommatid.metrics import auroc, balanced_accuracy, best_threshold, rank_correlation, unit
from ommatid.vlm import VisionModel

Labels = Mapping[int, str]
"""Names by latent."""


@dataclass(frozen=True)
class Tried:
    """Places of names in the joint space, (d_joint,) each."""

    name: Tensor
    """The latent's own."""
    shuffled: Tensor | None
    """Of another latent, by the same labeller, and another name; None: there is none."""
    random: Tensor | None
    """Of a word of the vocabulary, and another name; None: there is none."""


class Texts:
    """Words, and whatever else is a name: each the mean over the model's templates, less the mean of all the words, of unit norm.

    Taking the mean away takes out what all texts share (in CLIP, the gap between texts and images).
    """

    def __init__(self, model: VisionModel, words: Sequence[str], on_event: Listener = ignore) -> None:
        self._model = model
        self.words = tuple(words)
        self._place = {word: i for i, word in enumerate(self.words)}
        blocks = []
        for start in range(0, len(self.words), BLOCK):
            blocks.append(self._embed(self.words[start : start + BLOCK]))
            on_event(Progress("embed words", min(start + BLOCK, len(self.words)), len(self.words)))
        self.embeddings = torch.cat(blocks)
        """Of the words, (words, d_joint) float32."""
        self._mean = self.embeddings.mean(0) if len(self.words) > 1 else torch.zeros(self.embeddings.shape[1])
        for rows in self.embeddings.split(BLOCK):
            rows.copy_(unit(rows - self._mean))

    def rows(self, words: Iterable[str]) -> Tensor:
        """Places of some of the words in `embeddings`."""
        return torch.tensor([self._place[word] for word in words], dtype=torch.int64)

    def embed(self, names: Sequence[str]) -> Tensor:
        """Any names, (names, d_joint) float32; the model is asked only about those that are none of the words, once each."""
        others = [name for name in dict.fromkeys(names) if name not in self._place]
        new = [unit(self._embed(others[start : start + BLOCK]) - self._mean).float() for start in range(0, len(others), BLOCK)]
        of_others = dict(zip(others, torch.cat(new), strict=True)) if new else {}
        rows = [of_others[name] if name in of_others else self.embeddings[self._place[name]] for name in names]
        return torch.stack(rows) if rows else self.embeddings[:0]

    def _embed(self, names: Sequence[str]) -> Tensor:
        templates = self._model.text_templates
        by_template = [unit(self._model.embed_text([template.format(name) for name in names])) for template in templates]
        return torch.stack(by_template).mean(0).float().cpu()


class Controls:
    """Of every name of an SAE what it is compared with: drawn by a seed, the same word for all labellers."""

    def __init__(self, labels: Mapping[str, Labels], scored: Collection[int], texts: Texts, d_sae: int, seed: int) -> None:
        """`labels` has the names by labeller and latent; names of latents in `scored` are tried, and serve as controls."""
        self._texts = texts
        self._labels = labels
        names = sorted({label for of in labels.values() for latent, label in of.items() if latent in scored})
        self._places = dict(zip(names, texts.embed(names), strict=True))
        self._others = {labeller: others({i: of[i] for i in of if i in scored}, seed) for labeller, of in labels.items()}
        self._random = np.random.default_rng([seed, 2]).integers(len(texts.words), size=d_sae)

    def of(self, labeller: str, latent: int) -> Tried:
        """What is tried on a latent that is scored and has a name by that labeller."""
        label, other = self._labels[labeller][latent], self._others[labeller][latent]
        return Tried(self._places[label], None if other is None else self._places[other], self._random_word(latent, label))

    def _random_word(self, latent: int, label: str) -> Tensor | None:
        words = self._texts.words
        place = int(self._random[latent])
        if words[place] == label:
            place = (place + 1) % len(words)
        return None if words[place] == label else self._texts.embeddings[place]


def others(labels: Labels, seed: int) -> dict[int, str | None]:
    """For each latent the name of another one that is another name: the next such in a seeded order; None: all have the same."""
    order = np.random.default_rng([seed, 1]).permutation(sorted(labels)).tolist()
    found: dict[int, str | None] = {}
    later: str | None = None  # the next name after this place that is not the one of this place
    for here, after in zip(reversed(order * 2), reversed(order * 2 + order[:1]), strict=False):
        if labels[here] != labels[after]:
            later = labels[after]
        found[here] = later
    return found


BLOCK = 4096
"""Names embedded at a time."""


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
    halves: EvalSplit
    gathered: Gathered
    seed: int

    def draw(self, fired: LatentFirings) -> Trial | None:
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
