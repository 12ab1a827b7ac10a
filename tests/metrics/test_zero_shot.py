"""Proves the numbers of zero-shot classification against loops over images, SciPy's and scikit-learn's, and resampling."""

import math
from typing import Any

import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest, entropy, ttest_rel
from sklearn.metrics import accuracy_score, log_loss

from ommatid.metrics import Classified, classify, downstream_kl, downstream_loss, fit_scale, recovered

N, C = 400, 7


def draw(signal: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample cosines that carry information about the class, and the classes."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, C, (N,), generator=generator)
    cosines = 0.1 * torch.randn(N, C, generator=generator)
    cosines[torch.arange(N), classes] += signal
    return cosines, classes


def by_hand(cosines: torch.Tensor, classes: torch.Tensor, scale: float) -> tuple[list[bool], list[float]]:
    right, entropies = [], []
    for row, own in zip(cosines.tolist(), classes.tolist(), strict=True):
        weights = [math.exp(scale * cosine) for cosine in row]
        right.append(max(range(len(row)), key=row.__getitem__) == own)
        entropies.append(-math.log(weights[own] / sum(weights)))
    return right, entropies


def test_accuracy_equals_loops_and_scikit_learn() -> None:
    cosines, classes = draw(0.15)
    found = classify(cosines, classes, 12.0)
    right, entropies = by_hand(cosines, classes, 12.0)
    assert found.is_right.tolist() == right
    assert found.cross_entropies.tolist() == pytest.approx(entropies)
    assert found.accuracy.value == pytest.approx(accuracy_score(classes, cosines.argmax(1)))
    assert found.cross_entropy == pytest.approx(log_loss(classes, (12.0 * cosines.double()).softmax(1), labels=range(C)))


@pytest.mark.parametrize(("n_right", "n"), [(0, 20), (20, 20), (7, 20), (500, 1000)])
def test_interval_of_accuracy_is_wilsons(n_right: int, n: int) -> None:
    accuracy = Classified(torch.arange(n) < n_right, torch.zeros(n)).accuracy
    expected = binomtest(n_right, n).proportion_ci(method="wilson")
    assert (accuracy.low, accuracy.high) == pytest.approx((expected.low, expected.high), abs=1e-8)
    assert 0 <= accuracy.low <= accuracy.value <= accuracy.high <= 1


@pytest.mark.parametrize("signal", [0.02, 0.15, 0.4])
def test_fitted_scale_is_the_best(signal: float) -> None:
    cosines, classes = draw(signal)

    def loss(scale: float) -> float:
        return classify(cosines, classes, scale).cross_entropy

    best: Any = minimize_scalar(loss, bounds=(1, 1000), method="bounded", options={"xatol": 1e-6})
    assert loss(fit_scale(cosines, classes)) == pytest.approx(best.fun, abs=1e-9)
    assert fit_scale(cosines, classes) == pytest.approx(best.x, rel=1e-3)


def test_fitted_scale_stays_within_its_bounds() -> None:
    cosines, classes = draw(0.0)
    worse_than_chance, sure = cosines.clone(), 0.01 * cosines
    worse_than_chance[torch.arange(N), classes] -= 1
    sure[torch.arange(N), classes] += 1
    assert fit_scale(worse_than_chance, classes) == pytest.approx(1)
    assert fit_scale(sure, classes) == pytest.approx(1000)


def test_the_recovered_share_follows_its_definition() -> None:
    _, classes = draw(0.0)
    plain, spliced, mean = (classify(draw(signal)[0], classes, 15.0) for signal in (0.2, 0.15, 0.0))
    expected = (mean.cross_entropy - spliced.cross_entropy) / (mean.cross_entropy - plain.cross_entropy)
    found = recovered(plain, spliced, mean)
    assert found.value == pytest.approx(expected) and 0 < found.low < expected < found.high
    assert (recovered(plain, plain, mean).value, recovered(plain, mean, mean).value) == pytest.approx((1, 0))
    assert recovered(plain, classify(draw(0.3)[0], classes, 15.0), mean).value > 1
    assert recovered(plain, classify(draw(-0.2)[0], classes, 15.0), mean).value < 0


def test_downstream_loss_and_divergence_follow_their_definitions() -> None:
    (before, classes), (after, _) = draw(0.2), draw(0.15, 1)
    plain, spliced = (classify(cosines, classes, 15.0) for cosines in (before, after))
    found = downstream_loss(plain, spliced)
    assert found.value == pytest.approx(spliced.cross_entropy - plain.cross_entropy) and found.low < found.value < found.high
    interval: Any = ttest_rel(spliced.cross_entropies, plain.cross_entropies).confidence_interval()
    assert (found.low, found.high) == pytest.approx(tuple(interval), rel=0.02)
    p, q = ((15.0 * cosines.double()).softmax(1).numpy() for cosines in (before, after))
    assert downstream_kl(before, after, 15.0) == pytest.approx(float(entropy(p, q, axis=1).mean()))
    assert downstream_kl(before, before, 15.0) == 0 and downstream_loss(plain, plain).value == 0


def test_the_interval_of_the_recovered_share_agrees_with_resampling() -> None:
    _, classes = draw(0.0)
    plain, spliced, mean = (classify(draw(signal, seed)[0], classes, 15.0) for signal, seed in ((0.2, 0), (0.15, 1), (0.0, 2)))
    generator = torch.Generator().manual_seed(3)
    values = []
    for _ in range(2000):
        rows = torch.randint(0, N, (N,), generator=generator)
        values.append(recovered(*(Classified(of.is_right[rows], of.cross_entropies[rows]) for of in (plain, spliced, mean))).value)
    low, high = torch.tensor(values).quantile(torch.tensor([0.025, 0.975])).tolist()
    found = recovered(plain, spliced, mean)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_the_recovered_share_is_undefined_if_the_mean_does_no_harm() -> None:
    cosines, classes = draw(0.2)
    plain = classify(cosines, classes, 15.0)
    noise = 1e-4 * torch.randn(N, C, generator=torch.Generator().manual_seed(1))
    for mean in (plain, classify(cosines + noise, classes, 15.0), classify(draw(0.4)[0], classes, 15.0)):
        assert math.isnan(recovered(plain, plain, mean).value)
    one = Classified(plain.is_right[:1], plain.cross_entropies[:1])
    assert math.isnan(recovered(one, one, Classified(one.is_right, one.cross_entropies + 1)).low)
