"""Proves that reliance is counted as loops count it, and that a feature that misleads is suspicious and one that is the class is not.

Pictures have a class, a feature and a mark; models of known behaviour call them.
"""

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from ommatid.metrics.reliance import Pairs, count_pairs, follow_attribute, measure_reliance, share_of, suspicion


def count(truth: np.ndarray, called: np.ndarray, has: np.ndarray, n_classes: int = 2, least: int = 10) -> Pairs:
    return count_pairs([(0, np.flatnonzero(has))], truth, called, n_classes, least).pairs


def test_counts_and_expectations_agree_with_loops() -> None:
    rng = np.random.default_rng(0)
    truth, called, has = rng.integers(0, 3, 300), rng.integers(0, 3, 300), rng.random((5, 300)) < 0.3
    has[4] = False
    counted = count_pairs(((latent, np.flatnonzero(of)) for latent, of in enumerate(has)), truth, called, 3, least=20)
    pairs = counted.pairs
    assert len(pairs) + counted.n_too_few == 15 and set(pairs.latents.tolist()) == {0, 1, 2, 3}
    for at in range(len(pairs)):
        of, is_class = has[pairs.latents[at]], truth == pairs.classes[at]
        is_called = called == pairs.classes[at]
        expected = {
            "n_with": is_class & of, "n_without": is_class & ~of, "n_others_with": ~is_class & of, "n_others_without": ~is_class & ~of,
            "right_with": is_class & of & is_called, "right_without": is_class & ~of & is_called,
            "mistaken_with": ~is_class & of & is_called, "mistaken_without": ~is_class & ~of & is_called,
        }  # fmt: skip
        assert {name: getattr(pairs, name)[at] for name in expected} == {name: images.sum() for name, images in expected.items()}
        others = [c for c in range(3) if c != pairs.classes[at]]
        rate = [is_called[truth == c].mean() for c in others]
        assert pairs.expected[at] == pytest.approx(sum((of & (truth == c)).sum() * r for c, r in zip(others, rate, strict=True)))
        assert min(getattr(pairs, name)[at] for name in list(expected)[:4]) >= 20


def test_shares_have_the_exact_interval_of_scipy_and_widen_with_the_number_of_pairs() -> None:
    hits, n = np.array([0, 3, 10, 0]), np.array([10, 10, 10, 0])
    found = share_of(hits, n, 1)
    for at in range(3):
        expected = binomtest(int(hits[at]), 10).proportion_ci(method="exact")
        assert (found.low[at], found.high[at]) == pytest.approx((expected.low, expected.high))
    assert np.isnan(found.value[3]) and (found.low[3], found.high[3]) == (0, 1)
    wide = share_of(hits, n, 10_000)
    assert binom.sf(2, 10, wide.low[1]) == pytest.approx(0.025 / 10_000, rel=1e-6) and wide.high[1] > found.high[1]


def test_a_difference_of_shares_has_the_interval_of_newcombe_whichever_way_it_is_taken() -> None:
    one, other = share_of(np.array([9]), np.array([10]), 1), share_of(np.array([2]), np.array([40]), 1)
    ends = [binomtest(hits, n).proportion_ci(method="exact") for hits, n in ((9, 10), (2, 40))]
    found = one - other
    assert found.value[0] == pytest.approx(0.85)
    assert found.low[0] == pytest.approx(0.85 - np.hypot(0.9 - ends[0].low, ends[1].high - 0.05))
    assert found.high[0] == pytest.approx(0.85 + np.hypot(ends[0].high - 0.9, 0.05 - ends[1].low))
    back = other - one
    assert (back.low[0], back.high[0]) == (-found.high[0], -found.low[0])


def world(n: int = 2400, seed: int = 0) -> tuple[np.random.Generator, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng, rng.integers(0, 2, n)


def judge(truth: np.ndarray, called: np.ndarray, has: np.ndarray, target: int = 1, n_classes: int = 2, n_pairs: int = 1000) -> float:
    pairs = count(truth, called, has, n_classes)
    pair = pairs.take(np.flatnonzero(pairs.classes == target))
    return float(suspicion(measure_reliance(pair, n_pairs))[0])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share_of_class", [0.5, 0.7])
def test_a_mark_that_the_model_takes_for_the_class_is_suspicious(seed: int, share_of_class: float) -> None:
    """Even if the mark is as common in both classes, and only the model believes that it goes with one."""
    rng, truth = world(seed=seed)
    mark = rng.random(len(truth)) < np.where(truth == 1, share_of_class, 0.5)
    called = (truth + 0.7 * mark + rng.normal(0, 0.4, len(truth)) > 0.8).astype(int)
    assert judge(truth, called, mark) > 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("noise", [0.5, 0.7, 1.0])
@pytest.mark.parametrize("bar", [0.2, 0.5, 0.8])
def test_a_feature_that_is_the_class_is_not_suspicious_although_the_model_is_right_where_it_is_and_wrong_on_others_that_have_it(
    seed: int, noise: float, bar: float
) -> None:
    """The model sees the class through one noisy number, of which the feature is a part; whether it calls the class too often or not."""
    rng, truth = world(seed=seed)
    seen = truth + rng.normal(0, noise, len(truth))
    called = (seen > bar).astype(int)
    has = seen + rng.normal(0, 0.3, len(truth)) > bar + 0.2
    pairs = count(truth, called, has)
    pair = pairs.take(np.flatnonzero(pairs.classes == 1))
    if not len(pair):  # it cannot be told from the class: it is left out
        return
    found = measure_reliance(pair, 1)
    assert found.accuracy_more.value[0] > 0 and found.mistaken_more.value[0] > 0, "it looks like a wrong reason by accuracy alone"
    assert suspicion(found)[0] <= 0


def test_a_feature_of_another_class_is_not_suspicious_where_it_speaks_against_this_one() -> None:
    """Of cars, trucks and birds, a feature of trucks makes trucks less often mistaken for cars."""
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 3, 3000)
    seen = (truth == 1) + rng.normal(0, 0.4, 3000)
    called = np.where(truth == 2, 2, (seen > 0.5).astype(int))
    has = seen + rng.normal(0, 0.2, 3000) > 0.6
    assert judge(truth, called, has, target=0, n_classes=3) < 0 and judge(truth, called, has, target=1, n_classes=3) < 0


def test_a_feature_of_a_class_that_is_mistaken_with_and_without_it_is_not_suspicious() -> None:
    """The answer is wrong more often where it is, and others that have it are mistaken more often, but so are all others of their class."""
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 3, 6000)
    called = np.where((truth == 2) & (rng.random(6000) < 0.5), 0, truth)
    has = rng.random(6000) < np.array([0.3, 0.1, 0.9])[truth]
    pairs = count(truth, called, has, 3)
    found = measure_reliance(pairs.take(np.flatnonzero(pairs.classes == 0)), 1)
    assert found.mistaken_with.value[0] > 0.4 and found.trust_less.low[0] > 0.2
    assert found.mistaken_more.low[0] < 0 < found.mistaken_more.high[0] < 0.05 and suspicion(found)[0] < 0


def test_features_without_any_meaning_are_suspicious_less_often_than_the_level() -> None:
    rng, truth = world(600, 3)
    called = np.where(rng.random(len(truth)) < 0.25, 1 - truth, truth)
    having = [(latent, np.flatnonzero(rng.random(len(truth)) < 0.3)) for latent in range(2000)]
    pairs = count_pairs(having, truth, called, 2).pairs
    assert len(pairs) == 4000 and not (suspicion(measure_reliance(pairs)) > 0).any()


def test_a_latent_follows_the_attribute_or_the_class() -> None:
    ones, n = np.array([100]), np.array([100])
    assert follow_attribute(ones, n, 0 * ones, n, 1).value == 1 and follow_attribute(0 * ones, n, ones, n, 1).value == -1
    neither = follow_attribute(ones // 2, n, ones // 2, n, 1)
    assert neither.low[0] < 0 < neither.high[0] and neither.value[0] == 0


def test_following_an_attribute_makes_a_latent_suspicious_that_is_as_trustworthy_as_the_class() -> None:
    """In 95 % of the images the mark goes with the class, so the answer is right where it is; only the attribute tells them apart."""
    rng, truth = world(4000)
    mark = rng.random(len(truth)) < np.where(truth == 1, 0.95, 0.05)
    called = (truth + 1.2 * mark + rng.normal(0, 0.4, len(truth)) > 0.8).astype(int)
    pairs = count(truth, called, mark)
    pair = pairs.take(np.flatnonzero(pairs.classes == 1))
    found = measure_reliance(pair, 100)
    follows = follow_attribute(pair.n_others_with, pair.n_others_with, 0 * pair.n_without, pair.n_without, 100)
    assert suspicion(found)[0] < 0 < suspicion(found, follows)[0]
