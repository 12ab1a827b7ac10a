"""The tests for drift agree with loops, scikit-learn and scipy, are level where nothing has changed, and find what was planted."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, fisher_exact, mannwhitneyu
from sklearn.metrics import roc_auc_score

from ommatid.metrics import activation_shift, aurocs, domain_auroc, holm, least_found, mmd, n_permutations, permute, rate_shift, ratio_shift
from ommatid.metrics.drift import LEAST_FIRING


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_mmd(x: np.ndarray, y: np.ndarray, sigma: float) -> float:
    """Equation 3 of Gretton et al. 2012, in loops over pairs."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return math.exp(-float(((a - b) ** 2).sum()) / (2 * sigma**2))

    def within(z: np.ndarray) -> float:
        return sum(k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j) / (len(z) * (len(z) - 1))

    return within(x) + within(y) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


def test_mmd_equals_a_loop_over_pairs_for_the_identity_and_for_each_permutation() -> None:
    x, y = normal(13, 5, seed=0) + 0.3, normal(22, 5, seed=1)
    test, sigma = mmd(x, y, 20, seed=3)
    both = torch.cat([x, y]).double().numpy()
    distances = [float(np.linalg.norm(a - b)) for i, a in enumerate(both) for b in both[:i]]
    assert sigma == pytest.approx(sorted(distances)[(len(distances) - 1) // 2], rel=1e-6)  # torch takes the lower of two middle values
    values = [naive_mmd(both[chosen], both[~chosen], sigma) for chosen in permute(torch.arange(35) < 13, 20, 3).T.numpy()]
    assert test.value == pytest.approx(values[0], abs=1e-6)
    assert (test.mean, test.spread) == pytest.approx((np.mean(values[1:]), np.std(values[1:], ddof=1)), abs=1e-6)
    assert test.p == np.mean(np.array(values) >= values[0])


def test_aurocs_equal_scikit_learn_with_ties() -> None:
    scores = (normal(60, 4, seed=0) * 3).round()
    positive = torch.rand(60, 4, generator=torch.Generator().manual_seed(1)) < 0.4
    expected = [roc_auc_score(positive[:, i].numpy(), scores[:, i].numpy()) for i in range(4)]
    assert aurocs(scores, positive).tolist() == pytest.approx(expected)


def test_the_classifier_finds_a_shift_and_its_area_is_that_of_the_best_direction() -> None:
    new, before = normal(400, 6, seed=0), normal(800, 6, seed=1)
    new[:, 2] += 1.0
    test = domain_auroc(new, before, 100)
    assert test.p == 0.01
    assert test.value == pytest.approx(0.76, abs=0.04)  # Φ(1 / √2)
    assert test.mean == pytest.approx(0.5, abs=0.02) and test.chance < 0.56


@pytest.mark.parametrize("kind", ["mmd", "auroc", "fvu"])
def test_p_values_are_uniform_without_drift(kind: str) -> None:
    p = []
    for seed in range(60):
        new, before = normal(40, 3, seed=2 * seed), normal(70, 3, seed=2 * seed + 1)
        if kind == "mmd":
            p.append(mmd(new, before, 40, seed)[0].p)
        elif kind == "auroc":
            p.append(domain_auroc(new, before, 40, seed).p)
        else:
            p.append(ratio_shift(new[:, :2].abs() + 0.1, before[:, :2].abs() + 0.1, 40, seed).test.p)
    n = sum(value <= 0.1 for value in p)
    assert binom.sf(n - 1, 60, 0.1) > 1e-3, p  # no more than 10 % of them, within what 60 draws can tell
    assert binom.cdf(sum(value <= 0.5 for value in p), 60, 0.5) > 1e-3, p  # and a test that never finds anything would fail this


def test_a_ratio_is_that_of_the_sums_and_its_interval_holds_the_difference() -> None:
    generator = torch.Generator().manual_seed(0)
    size = 1 + 9 * torch.rand(300, generator=generator)
    before = torch.stack([0.3 * size * (0.5 + torch.rand(300, generator=generator)), size], dim=1)
    new = before.flip(0).clone()
    new[:, 0] *= 1.5
    shift = ratio_shift(new, before, 200)
    assert shift.before == pytest.approx(float(before[:, 0].sum() / before[:, 1].sum()))
    assert shift.new == pytest.approx(1.5 * shift.before)
    assert shift.low < shift.new - shift.before < shift.high and shift.low > 0
    assert shift.test.p == 1 / 200


def test_rates_are_compared_by_fishers_exact_test_of_each_latent() -> None:
    new, before = torch.tensor([30, 5, 0, 3, 50]), torch.tensor([20, 14, 9, 4, 60])
    p = rate_shift(new, 50, before, 120)
    assert p[3].isnan()  # on 7 images
    for one, few, many in [(0, 30, 20), (1, 5, 14), (2, 0, 9), (4, 50, 60)]:
        tails: list[Any] = [fisher_exact([[few, 50 - few], [many, 120 - many]], alternative=side)[1] for side in ("less", "greater")]
        assert float(p[one]) == pytest.approx(min(1.0, 2 * min(tails)), rel=1e-9)


def test_activations_are_compared_by_scipys_rank_sum_test_of_each_latent_with_ties() -> None:
    rng = np.random.default_rng(0)
    latents = rng.integers(0, 5, 600)
    latents[latents == 4] = rng.choice([0, 4], (latents == 4).sum(), p=[0.95, 0.05])  # latent 4 fires on too few
    acts = (rng.gamma(2, size=600) * 4).round() + latents
    is_new = rng.random(600) < 0.3
    p = activation_shift(torch.from_numpy(latents), torch.from_numpy(acts), torch.from_numpy(is_new), 6)
    for latent in range(4):
        mine = latents == latent
        expected = mannwhitneyu(acts[mine & is_new], acts[mine & ~is_new], method="asymptotic", use_continuity=True).pvalue
        assert float(p[latent]) == pytest.approx(expected, rel=1e-9)
    assert min((is_new & (latents == 4)).sum(), (~is_new & (latents == 4)).sum()) < LEAST_FIRING
    assert p[4:].isnan().all()
    nothing = activation_shift(torch.empty(0, dtype=torch.int64), torch.empty(0), torch.empty(0, dtype=torch.bool), 2)
    assert nothing.isnan().all()


def test_holm_adjusts_step_down_and_leaves_out_what_was_not_tested() -> None:
    adjusted = holm(torch.tensor([0.04, math.nan, 0.01, 0.03, 0.9], dtype=torch.float64))
    assert adjusted[[0, 2, 3, 4]].tolist() == pytest.approx([0.09, 0.04, 0.09, 0.9])
    assert adjusted[1].isnan()
    assert holm(torch.tensor([math.nan], dtype=torch.float64)).isnan().all()


def test_the_smallest_shift_that_is_found_is_found_four_times_of_five() -> None:
    spread, alpha = 0.02, 0.0125
    shift = least_found(spread, alpha)
    drawn = shift + spread * normal(20_000, seed=0).double()
    threshold = spread * 2.2414  # z of 1 − 0.0125
    assert float((drawn > threshold).double().mean()) == pytest.approx(0.8, abs=0.01)
    assert least_found(spread, alpha, two_sided=True) > shift


def test_permutations_keep_the_number_of_new_images_and_resolve_the_level() -> None:
    drawn = permute(torch.arange(30) < 7, n_permutations(0.05), 1)
    assert drawn.shape == (30, 400) and drawn.sum(0).eq(7).all() and drawn[:7, 0].all()
