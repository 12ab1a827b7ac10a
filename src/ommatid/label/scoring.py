"""Scores of labels: detection and correlation on held-out images, beside control labels that do not belong to the latent, and mistakes."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64, Shaped
from torch import Tensor

from ommatid import schemas
from ommatid.compute.undefined import none_for_nan
from ommatid.events import Listener, Progress, ignore
from ommatid.images.eval_split import EvalSplit, LatentFirings
from ommatid.label.evidence import Evidence, Test, draw_test
from ommatid.metrics import auroc, balanced_accuracy, best_threshold, precision_at, rank_correlation, unit
from ommatid.vlm import VisionModel

Labels = Mapping[int, str]
"""Labels by latent."""


@dataclass(frozen=True)
class LabelEmbeddings:
    """Embeddings of a latent's label and its controls in the joint space, `(d_joint,)` each."""

    label: Float32[Tensor, " d_joint"]
    """The latent's label."""
    shuffled: Float32[Tensor, " d_joint"] | None
    """A different label that the same labeller gave to another latent; None if there is none."""
    random: Float32[Tensor, " d_joint"] | None
    """A random word of the vocabulary that differs from the label; None if there is none."""


class Texts:
    """Embeddings of words and other labels: the mean over the model's templates, less the mean of all words, scaled to unit norm.

    Subtracting the mean removes what all texts share, such as the gap between texts and images in CLIP.

    Args:
        model: The model whose text tower embeds the texts.
        words: The words of all labellers.
        on_event: Called with each progress event and warning.
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
        """Embeddings of the words, `(words, d_joint)` float32."""
        self._mean = self.embeddings.mean(0) if len(self.words) > 1 else torch.zeros(self.embeddings.shape[1])
        for rows in self.embeddings.split(BLOCK):
            rows.copy_(unit(rows - self._mean))

    def rows(self, words: Iterable[str]) -> Int64[Tensor, " words"]:
        """Return the rows of some of the words in `embeddings`, `(words,)` int64."""
        return torch.tensor([self._place[word] for word in words], dtype=torch.int64)

    def embed(self, labels: Sequence[str]) -> Float32[Tensor, "labels d_joint"]:
        """Embed any labels, `(labels, d_joint)` float32. The model embeds only those that are not among the words, each once."""
        new = [label for label in dict.fromkeys(labels) if label not in self._place]
        blocks = [unit(self._embed(new[start : start + BLOCK]) - self._mean).float() for start in range(0, len(new), BLOCK)]
        embedded = dict(zip(new, torch.cat(blocks), strict=True)) if blocks else {}
        rows = [embedded[label] if label in embedded else self.embeddings[self._place[label]] for label in labels]
        return torch.stack(rows) if rows else self.embeddings[:0]

    def _embed(self, texts: Sequence[str]) -> Float32[Tensor, "labels d_joint"]:
        """Return the mean embedding over the templates of each text, `(texts, d_joint)` float32."""
        templates = self._model.text_templates
        by_template = [unit(self._model.embed_text([template.format(text) for text in texts])) for template in templates]
        return torch.stack(by_template).mean(0).float().cpu()


class Controls:
    """Control labels for every label of an SAE, sampled with a seed. The random word of a latent is the same for all labellers.

    Args:
        labels: Labels by labeller and latent.
        scored: Latents whose labels are scored; the controls of a label are among the labels of these latents.
        texts: Embeddings of the words.
        d_sae: Number of latents.
        seed: Seed of the controls.
    """

    def __init__(self, labels: Mapping[str, Labels], scored: Collection[int], texts: Texts, d_sae: int, seed: int) -> None:
        self._texts = texts
        self._labels = labels
        distinct = sorted({label for by_latent in labels.values() for latent, label in by_latent.items() if latent in scored})
        self._embeddings = dict(zip(distinct, texts.embed(distinct), strict=True))
        self._others = {
            labeller: other_labels({i: label for i, label in by_latent.items() if i in scored}, seed)
            for labeller, by_latent in labels.items()
        }
        self._random = np.random.default_rng([seed, 2]).integers(len(texts.words), size=d_sae)

    def of(self, labeller: str, latent: int) -> LabelEmbeddings:
        """Return the embeddings of a labeller's label for a latent, which must be scored, and of its controls."""
        label, other = self._labels[labeller][latent], self._others[labeller][latent]
        shuffled = None if other is None else self._embeddings[other]
        return LabelEmbeddings(self._embeddings[label], shuffled, self._random_word(latent, label))

    def _random_word(self, latent: int, label: str) -> Float32[Tensor, " d_joint"] | None:
        words = self._texts.words
        place = int(self._random[latent])
        if words[place] == label:
            place = (place + 1) % len(words)
        return None if words[place] == label else self._texts.embeddings[place]


def other_labels(labels: Labels, seed: int) -> dict[int, str | None]:
    """Return a different label for each latent: that of the next latent in a random order whose label differs.

    Args:
        labels: Labels by latent.
        seed: Seed of the order.

    Returns:
        Labels of other latents, by latent; None if all latents have the same label.
    """
    order = np.random.default_rng([seed, 1]).permutation(sorted(labels)).tolist()
    found: dict[int, str | None] = {}
    later: str | None = None  # The next label in the order that differs from the label of `here`.
    for here, after in zip(reversed(order * 2), reversed(order * 2 + order[:1]), strict=False):
        if labels[here] != labels[after]:
            later = labels[after]
        found[here] = later
    return found


BLOCK = 4096
"""Texts embedded at once."""


@dataclass(frozen=True)
class Trial:
    """Images on which all labels of a latent are tested."""

    naming: Test
    """Images that set the detection threshold."""
    held_out: Test
    """Images that score the labels."""
    base_rate: float
    """Share of all held-out images on which the latent fires."""
    silent: Int[np.ndarray, " silent"]
    """Rows of a sample of all held-out images on which it does not fire."""


MISTAKE = np.dtype(
    [("is_missed", "?"), ("rank", "i4"), ("row", "i4"), ("cosine", "f4"), ("threshold", "f4"), ("act", "f4"), ("is_hard", "?")]
)
"""A held-out image that a label gets wrong, as a row of the table `mistakes`; `row` is that of `EvalSplit`."""


def find_mistakes(
    test: Test, fired: Float32[Tensor, " firing"], silent: Float32[Tensor, " silent"], threshold: float
) -> Shaped[np.ndarray, " mistakes"]:
    """Choose the images on which a label is farthest from right; of equally far ones, those with the lower numbers come first.

    Args:
        test: Held-out test images.
        fired: Cosines of the label with the firing images, `(firing,)`.
        silent: Cosines of the label with the silent images, `(silent,)`.
        threshold: Detection threshold.

    Returns:
        Up to `schemas.N_MISTAKES` images of each kind, as an array of `MISTAKE`: those missed first.
    """
    found = []
    for is_missed, rows, cosines in ((True, test.positive, fired), (False, test.negative, silent)):
        wrong = ((cosines > threshold) != is_missed).numpy()  # compared as balanced_accuracy does
        distance = cosines.numpy() if is_missed else -cosines.numpy()
        places = np.lexsort((rows, distance))
        places = places[wrong[places]][: schemas.N_MISTAKES]
        mistakes = np.empty(len(places), MISTAKE)
        mistakes["is_missed"], mistakes["rank"], mistakes["row"] = is_missed, np.arange(1, len(places) + 1), rows[places]
        mistakes["cosine"], mistakes["threshold"] = cosines.numpy()[places], threshold
        mistakes["act"] = test.acts[places] if is_missed else 0.0
        mistakes["is_hard"] = False if is_missed else places < len(test.hard)
        found.append(mistakes)
    return np.concatenate(found)


@dataclass(frozen=True)
class Scored:
    """Scores of a label, and what it got wrong."""

    scores: Mapping[str, float | None]
    """Scores by their columns in the table `labels`."""
    mistakes: Shaped[np.ndarray, " mistakes"]
    """Held-out images that the label gets wrong, as an array of `MISTAKE`."""


N_SAMPLE = 1024
"""Largest number of held-out images, whether a latent fires on them or not, from which the rate of false alarms is estimated."""


@dataclass(frozen=True)
class Scorer:
    """Scores how well a label's embedding distinguishes images that fire a latent from images that do not."""

    images: Float32[Tensor, "images d_joint"]
    """Joint embeddings of the evaluation images, `(images, d_joint)`."""
    split: EvalSplit
    """The evaluation images and their halves."""
    evidence: Evidence
    """Evidence about the latents."""
    seed: int
    """Seed with which test images are sampled."""

    def draw(self, fired: LatentFirings) -> Trial | None:
        """Sample the images on which a latent's labels are tested; None if it fires on all images of a half."""
        rng = np.random.default_rng([self.seed, fired.latent])
        neighbours = self.evidence.neighbour_rows(fired.latent)
        naming, held_out = (draw_test(fired, self.split, half, neighbours, rng) for half in (False, True))
        if not len(naming.negative) or not len(held_out.negative):
            return None
        base_rate = self.split.is_held_out[fired.rows].sum() / self.split.is_held_out.sum()
        return Trial(naming, held_out, float(base_rate), np.setdiff1d(self.sample, fired.rows, assume_unique=True))

    @cached_property
    def sample(self) -> Int[np.ndarray, " rows"]:
        """Rows of a random sample of the held-out images, the same for all latents."""
        rng = np.random.default_rng([self.seed, 3])
        return rng.permutation(np.flatnonzero(self.split.is_held_out))[:N_SAMPLE]

    def score(self, trial: Trial, embeddings: LabelEmbeddings) -> "Scored":
        """Score a label and its controls on the same images.

        Args:
            trial: Test images.
            embeddings: Embeddings of the label and its controls.

        Returns:
            The scores, and the images behind them that the label gets wrong.
        """
        naming, held_out = self._embeddings_of(trial.naming), self._embeddings_of(trial.held_out)
        own = _Cosines.of(naming, held_out, embeddings.label)
        controls = (embeddings.shuffled, embeddings.random)
        shuffled, random = (None if control is None else _Cosines.of(naming, held_out, control) for control in controls)
        area, low, high = auroc(*own.held_out)
        acts = torch.from_numpy(np.concatenate([trial.held_out.acts, np.zeros(len(trial.held_out.negative))]))
        scores = {
            "score": own.detect(),
            "auroc": area,
            "auroc_low": low,
            "auroc_high": high,
            "control_score": shuffled and shuffled.detect(),
            "random_score": random and random.detect(),
            "correlation": own.correlate(acts),
            "control_correlation": shuffled and shuffled.correlate(acts),
            **self._predict(trial, own, embeddings.label),
        }
        return Scored(scores, find_mistakes(trial.held_out, *own.held_out, own.threshold))

    def _predict(self, trial: Trial, own: "_Cosines", label: Float32[Tensor, " d_joint"]) -> dict[str, float | None]:
        """Return precision and recall of the label among all held-out images, and both by chance."""
        recall = float((own.held_out[0] > own.threshold).double().mean())
        found = (self.images[torch.from_numpy(trial.silent)] @ label > own.threshold).double()
        alarm_rate = float(found.mean()) if len(found) else math.nan
        by_chance = trial.base_rate * recall + (1 - trial.base_rate) * alarm_rate
        numbers = {"recall": recall, "recall_chance": by_chance, "precision": precision_at(recall, alarm_rate, trial.base_rate)}
        return none_for_nan({**numbers, "precision_chance": trial.base_rate})

    def _embeddings_of(self, test: Test) -> "Pair":
        return self.images[torch.from_numpy(test.positive)], self.images[torch.from_numpy(test.negative)]


Pair = tuple[Tensor, Tensor]
"""Values for a test's firing images, and for its silent ones."""


@dataclass(frozen=True)
class _Cosines:
    """Cosines of a label with the test images of both halves, computed once for all its scores."""

    naming: Pair
    """Cosines with the images of the naming half, `(images,)` each."""
    held_out: Pair
    """Cosines with the images of the held-out half, `(images,)` each."""

    @classmethod
    def of(cls, naming: Pair, held_out: Pair, label: Float32[Tensor, " d_joint"]) -> "_Cosines":
        """Compute the cosines from embeddings of the images, `(images, d_joint)` each, and of the label, `(d_joint,)`."""
        return cls((naming[0] @ label, naming[1] @ label), (held_out[0] @ label, held_out[1] @ label))

    @cached_property
    def threshold(self) -> float:
        """Threshold that is best on the images of the naming half."""
        return best_threshold(*self.naming)

    def detect(self) -> float:
        """Return the balanced accuracy on held-out images, at the threshold."""
        return balanced_accuracy(*self.held_out, self.threshold)

    def correlate(self, acts: Float[Tensor, " images"]) -> float | None:
        """Return the rank correlation with the activations on held-out images; None if either is constant."""
        found = rank_correlation(torch.cat(self.held_out), acts)
        return None if math.isnan(found) else found


N_DETECTED = 8
"""Largest number of firing held-out images that a detector judges, and of silent ones; every image adds to the cost of a request."""


def draw_detection(test: Test) -> tuple[Int[np.ndarray, " rows"], int]:
    """Choose the images that a detector judges; half of the silent ones are hard.

    Args:
        test: Held-out test images.

    Returns:
        Rows of the images, firing ones first, and the number of firing ones.
    """
    positive = test.positive[:N_DETECTED]
    hard = test.hard[: len(positive) // 2]
    return np.concatenate([positive, hard, test.random[: len(positive) - len(hard)]]), len(positive)


def grade(grades: tuple[float, ...], n_firing: int) -> dict[str, float]:
    """Score the grades of a detector, with a threshold of one half.

    Args:
        grades: How clearly each image shows what the label says, 0 to 1, firing images first.
        n_firing: Number of firing images.

    Returns:
        The scores by their columns in the table `labels`.
    """
    positive, negative = torch.tensor(grades[:n_firing]), torch.tensor(grades[n_firing:])
    return {"detector_score": balanced_accuracy(positive, negative, 0.5), "detector_auroc": auroc(positive, negative)[0]}
