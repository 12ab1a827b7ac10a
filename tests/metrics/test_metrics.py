"""Proves every metric against its definition written as slow loops, scikit-learn, or a resampling experiment."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import balanced_accuracy_score, r2_score, roc_auc_score

from ommatid.metrics import (
    Fidelity,
    Firing,
    Monosemanticity,
    MonosemanticityInterval,
    TopImages,
    auroc,
    balanced_accuracy,
    best_threshold,
    purity,
    rank_correlation,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairwise_ms(acts: torch.Tensor, judge: torch.Tensor) -> float:
    """Compute the definition pair by pair (Pach et al. 2025, eq. 9)."""
    a = acts.double()
    a = (a - a.min()) / (a.max() - a.min())
    p = torch.nn.functional.normalize(judge.double(), dim=1)
    above = below = 0.0
    for n in range(len(a)):
        for m in range(n + 1, len(a)):
            above += float(a[n] * a[m] * (p[n] @ p[m]))
            below += float(a[n] * a[m])
    return above / below


def make_ms(acts: torch.Tensor, judge: torch.Tensor, batch: int = 1000) -> Monosemanticity:
    ms = Monosemanticity(acts.shape[1], judge.shape[1])
    for a, e in zip(acts.split(batch), judge.split(batch), strict=True):
        ms.add(a, e)
    return ms


def test_monosemanticity_equals_the_pairwise_loop() -> None:
    acts, judge = random(40, 5).relu(), random(40, 7, seed=1) + 0.5
    acts[:, 3] = random(40, seed=2) - 5  # negative: raw neurons are
    acts[:, 4] = acts[:, 4] * 1e4 + 1e4  # far from zero
    scores = make_ms(acts, judge, batch=9).scores()
    for latent in range(5):
        assert float(scores.ms[latent]) == pytest.approx(pairwise_ms(acts[:, latent], judge), rel=1e-9)


def test_floor_is_the_mean_pairwise_cosine() -> None:
    judge = random(30, 7) + 1
    p = torch.nn.functional.normalize(judge.double(), dim=1)
    cosines = (p @ p.T)[~torch.eye(30, dtype=torch.bool)]
    assert make_ms(random(30, 2), judge).scores().floor == pytest.approx(float(cosines.mean()))


def test_monosemanticity_is_nan_where_it_is_undefined() -> None:
    acts = torch.zeros(10, 4)
    acts[:, 1] = 3.0  # constant
    acts[2, 2] = 1.0  # one image
    acts[2:4, 3] = 1.0
    ms = make_ms(acts, random(10, 3)).scores().ms
    assert ms.isnan().tolist() == [True, True, True, False]
    assert make_ms(acts[:1], random(1, 3)).scores().ms.isnan().all()


@given(cut=st.integers(1, 39))
@settings(max_examples=15, deadline=None)
def test_monosemanticity_of_parts_merges_to_that_of_the_whole(cut: int) -> None:
    acts, judge = random(40, 5).relu(), random(40, 7, seed=1)
    one, other = make_ms(acts[:cut], judge[:cut]), make_ms(acts[cut:], judge[cut:])
    one.merge(other)
    torch.testing.assert_close(one.scores().ms, make_ms(acts, judge).scores().ms, rtol=1e-10, atol=1e-12)


def test_monosemanticity_finds_the_latent_that_means_one_thing() -> None:
    classes = torch.arange(200) % 4
    judge = torch.nn.functional.one_hot(classes, 4).float() + 0.1 * random(200, 4).abs()
    pure, mixed = (classes == 0).float(), ((classes == 0) | (classes == 1)).float()
    scores = make_ms(torch.stack([pure, mixed, random(200).abs()], 1), judge).scores()
    assert scores.ms[0] > scores.ms[1] + 0.3 > scores.ms[2] + 0.3
    assert float(scores.ms[2]) == pytest.approx(scores.floor, abs=0.03)


def test_interval_agrees_with_a_poisson_bootstrap() -> None:
    acts, judge = random(400, 6).relu(), random(400, 8, seed=1) + 0.5
    first = make_ms(acts, judge)
    interval = MonosemanticityInterval(first)
    for a, e in zip(acts.split(64), judge.split(64), strict=True):
        interval.add(a, e)
    a = ((acts - first.min) / (first.max - first.min)).double()
    p = torch.nn.functional.normalize(judge.double(), dim=1)
    counts = torch.poisson(torch.ones(2000, 400, dtype=torch.float64), generator=torch.Generator().manual_seed(0))
    replicates = []
    for c in counts:
        u, v, w = (c[:, None] * a).sum(0), (c[:, None] * a.square()).sum(0), (c[:, None] * a).T @ p
        replicates.append((w.square().sum(1) - v) / (u.square() - v))
    stack = torch.stack(replicates)
    torch.testing.assert_close(interval.variance.sqrt(), stack.std(0), rtol=0.12, atol=0)
    low, high = interval.of_mean()
    assert (high - low) / (2 * 1.96) == pytest.approx(float(stack.mean(1).std()), rel=0.12)


def test_fidelity_equals_its_definition_and_scikit_learn() -> None:
    x, error = random(50, 6) * 3 + 2, random(50, 6, seed=1)
    fidelity, other = Fidelity(), Fidelity()
    fidelity.add(x[:20], x[:20] + error[:20], 100)
    other.add(x[20:], x[20:] + error[20:], 150)
    fidelity.merge(other)
    assert fidelity.fvu == pytest.approx(1 - r2_score(x, x + error, multioutput="variance_weighted"), rel=1e-6)
    assert fidelity.l0 == 5.0
    assert fidelity.cosine == pytest.approx(float(torch.cosine_similarity(x, x + error, dim=1).mean()), rel=1e-6)


def test_predicting_the_mean_has_fvu_one() -> None:
    x = random(50, 6) + 4
    fidelity = Fidelity()
    fidelity.add(x, x.mean(0).expand_as(x), 0)
    assert fidelity.fvu == pytest.approx(1)
    empty = Fidelity()
    assert math.isnan(empty.fvu)
    assert math.isnan(empty.l0)


def test_firings_are_counted() -> None:
    acts = torch.tensor([[0.0, 1.0, 0.0], [2.0, 3.0, 0.0], [0.0, 5.0, 0.0]])
    firing = Firing(3)
    firing.add(acts[:2], acts[:2].amax(0, keepdim=True))
    firing.add(acts[2:], acts[2:])
    assert firing.density.tolist() == [1 / 3, 1.0, 0.0]
    assert firing.mean.tolist()[:2] == [2.0, 3.0]
    assert firing.mean[2].isnan()
    assert firing.max.tolist() == [2.0, 5.0, 0.0]
    assert firing.n_images.tolist() == [1, 2, 0]
    assert firing.is_dead.tolist() == [False, False, True]


@given(seed=st.integers(0, 100), batch=st.integers(1, 40), floor=st.sampled_from([0.0, -math.inf]))
@settings(max_examples=30, deadline=None)
def test_top_images_equals_a_sort(seed: int, batch: int, floor: float) -> None:
    """Values at the floor, 0 or minus infinity, are in any order."""
    acts = torch.randint(0, 9, (40, 3), generator=torch.Generator().manual_seed(seed)).float()
    acts = acts if floor == 0 else torch.where(acts == 0, floor, acts - 9)
    top = TopImages(3, 5, floor)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))  # a stream is not in the images' order
    for some in order.split(batch):
        top.add(acts[some], some)
    for latent in range(3):
        strongest = sorted(range(40), key=lambda i: (-float(acts[i, latent]), i))[:5]
        is_above = top.acts[:, latent] > floor
        assert top.images[is_above, latent].tolist() == [i for i in strongest if acts[i, latent] > floor]


def test_purity_is_the_share_of_the_commonest_class() -> None:
    values = purity([["a", "a", "b", "a"], ["a", "b"], ["c"] * 4], 4)
    assert values[0] == 0.75
    assert math.isnan(values[1])
    assert values[2] == 1.0


@given(st.lists(st.integers(0, 8), min_size=2, max_size=30), st.lists(st.integers(0, 8), min_size=2, max_size=30))
@settings(max_examples=60, deadline=None)
def test_detection_scores_equal_scikit_learn(positive: list[int], negative: list[int]) -> None:
    pos, neg = torch.tensor(positive, dtype=torch.float64), torch.tensor(negative, dtype=torch.float64)
    truth, scores = np.array([1] * len(pos) + [0] * len(neg)), torch.cat([pos, neg]).numpy()
    area, low, high = auroc(pos, neg)
    assert area == pytest.approx(roc_auc_score(truth, scores))
    assert 0 <= low <= area <= high <= 1
    threshold = best_threshold(pos, neg)
    best = balanced_accuracy(pos, neg, threshold)
    assert best == pytest.approx(balanced_accuracy_score(truth, scores > threshold))
    assert best >= max(balanced_accuracy_score(truth, scores > cut) for cut in np.arange(-0.5, 9)) - 1e-9


@given(st.lists(st.integers(0, 8), min_size=1, max_size=30), st.lists(st.integers(0, 8), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_among_equally_good_thresholds_the_lowest_is_chosen(positive: list[int], negative: list[int]) -> None:
    values = sorted({*positive, *negative})

    def accuracy(cut: int) -> Fraction:
        return Fraction(sum(x > cut for x in positive), len(positive)) + Fraction(sum(x <= cut for x in negative), len(negative))

    lowest = max(values, key=accuracy)  # of equals max takes the first
    after = values[values.index(lowest) + 1 :][:1] or [lowest]
    assert best_threshold(torch.tensor(positive).double(), torch.tensor(negative).double()) == (lowest + after[0]) / 2


@pytest.mark.parametrize("n_values", [2, 5, 1000])
def test_rank_correlation_equals_scipy_including_ties(n_values: int) -> None:
    x = torch.randint(n_values, (60,), generator=torch.Generator().manual_seed(1))
    y = x + torch.randint(n_values, (60,), generator=torch.Generator().manual_seed(2))
    assert rank_correlation(x, y.float()) == pytest.approx(spearmanr(x, y)[0])
    assert rank_correlation(x, -x) == pytest.approx(-1)


def test_rank_correlation_with_a_constant_is_undefined() -> None:
    assert math.isnan(rank_correlation(torch.ones(5), torch.arange(5)))
    assert math.isnan(rank_correlation(torch.arange(1), torch.arange(1)))


def test_auroc_intervals_have_their_nominal_coverage() -> None:
    truth = 0.5 * (1 + math.erf(1 / 2))  # two normals one standard deviation apart
    hits = 0
    for seed in range(300):
        _, low, high = auroc(random(40, seed=2 * seed) + 1, random(40, seed=2 * seed + 1))
        hits += low <= truth <= high
    assert 0.9 <= hits / 300 <= 0.99
