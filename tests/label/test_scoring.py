"""Precision and recall of a label are those of counting over all held-out images, and at chance for a label that knows nothing."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from ommatid.images.eval_split import EvalSplit, LatentFirings
from ommatid.label import scoring
from ommatid.label.scoring import LabelEmbeddings, Scorer
from ommatid.metrics import precision_at, unit

N, D = 900, 6


def make(n_firing: int, strength: float, seed: int) -> tuple[Scorer, LatentFirings, torch.Tensor]:
    """Make images of which the first axis says, with some noise, on which ones a latent fires, and a label along that axis."""
    rng = np.random.default_rng(seed)
    fires = np.zeros(N, bool)
    fires[rng.permutation(N)[:n_firing]] = True
    images = torch.from_numpy(rng.standard_normal((N, D)))
    images[:, 0] += strength * torch.from_numpy(fires)
    split = EvalSplit(np.arange(N), rng.random(N) < 0.5)
    evidence = cast(Any, SimpleNamespace(neighbour_rows=lambda latent: [np.arange(0, N, 7)]))
    label = torch.eye(D)[0]
    return Scorer(unit(images).float(), split, evidence, seed), LatentFirings(3, np.flatnonzero(fires), np.ones(n_firing)), label


@pytest.mark.parametrize("strength", [0.0, 2.0, 8.0])
def test_precision_and_recall_are_those_of_counting(strength: float) -> None:
    scorer, fired, label = make(100, strength, seed=1)
    trial = scorer.draw(fired)
    assert trial and len(trial.held_out.positive) < scoring.N_SAMPLE
    scores = scorer.score(trial, LabelEmbeddings(label, None, None)).scores
    naming = [scorer.images[torch.from_numpy(rows)] @ label for rows in (trial.naming.positive, trial.naming.negative)]
    held_out = scorer.split.is_held_out
    predicted = (scorer.images @ label).numpy()[held_out] > scoring.best_threshold(*naming)
    fires = np.isin(np.arange(N), fired.rows)[held_out]
    assert scores["recall"] == pytest.approx(predicted[fires].mean()) and scores["recall_chance"] == pytest.approx(predicted.mean())
    assert scores["precision"] == pytest.approx(fires[predicted].mean()) and scores["precision_chance"] == pytest.approx(fires.mean())
    precision, chance = scores["precision"], scores["precision_chance"]
    assert precision and chance and (precision < 1.6 * chance if not strength else precision > 3 * chance)


def test_a_sample_of_the_silent_images_estimates_them(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, fired, label = make(100, 2.0, seed=1)
    trial = scorer.draw(fired)
    monkeypatch.setattr(scoring, "N_SAMPLE", 200)
    scorer, *_ = make(100, 2.0, seed=1)
    sampled = scorer.draw(fired)
    assert trial and sampled and 150 < len(sampled.silent) < 200 < len(trial.silent)
    assert set(sampled.silent) <= set(trial.silent) and not set(trial.silent) & set(fired.rows)
    of = [scorer.score(one, LabelEmbeddings(label, None, None)).scores for one in (trial, sampled)]
    assert of[0]["recall"] == of[1]["recall"] and of[1]["precision"] == pytest.approx(of[0]["precision"], rel=0.3)


def test_precision_of_a_label_that_predicts_nowhere_is_undefined() -> None:
    assert np.isnan(precision_at(0.0, 0.0, 0.1)) and precision_at(0.5, 0.5, 0.1) == pytest.approx(0.1)
    assert precision_at(1.0, 0.0, 0.1) == 1
