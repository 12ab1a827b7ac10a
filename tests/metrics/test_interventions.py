"""Proves the outcomes of interventions against loops, SciPy's and published numbers, and the rule of the status by simulation.

A random latent must not be called causal more often than the level allows, and a planted effect must be found.
"""

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln
from sklearn.metrics import accuracy_score
from torch.nn.functional import cosine_similarity

from ommatid.metrics import (
    BestControl,
    DoseCurve,
    StatusRule,
    ablation_sparsity,
    answer_shift,
    best_control,
    beyond_the_rest,
    bootstrap_mean,
    bootstrap_means,
    change_rates,
    collateral,
    cosine_drift,
    decide_status,
    erasures,
    fit_leace,
    fit_probes,
    group_accuracies,
    log_odds,
    output_score,
    probe_accuracies,
    raised_most,
    steering_score,
    unit,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Means over images


def test_the_bootstrap_agrees_with_scipys() -> None:
    values = random(3, 150).double().exp()
    means, low, high = bootstrap_means(values, seed=1)
    torch.testing.assert_close(means, values.mean(1))
    for at, row in enumerate(values.numpy()):
        expected = scipy.stats.bootstrap((row,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(0))
        width = expected.confidence_interval.high - expected.confidence_interval.low
        assert (float(low[at]), float(high[at])) == pytest.approx(tuple(expected.confidence_interval), abs=0.08 * width)
    one = bootstrap_mean(values[1], seed=1)
    assert (one.value, one.low, one.high) == pytest.approx((float(means[1]), float(low[1]), float(high[1])))
    assert bootstrap_mean(values[1], seed=2) != one == bootstrap_mean(values[1], seed=1)


def test_a_mean_of_nothing_is_undefined_and_one_of_equal_values_is_sure() -> None:
    assert math.isnan(bootstrap_mean(torch.zeros(0)).low)
    same = bootstrap_mean(torch.full((30,), 0.25))
    assert (same.value, same.low, same.high) == (0.25, 0.25, 0.25)


def test_the_bootstrap_of_many_images_is_that_of_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = random(2, 40)
    whole = bootstrap_means(values)
    monkeypatch.setattr("ommatid.metrics.interventions.BLOCK", 40 * 64)
    for ours, theirs in zip(bootstrap_means(values), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


# Predictions that change


def predictions(changed: int, of: int, changed_others: int, of_others: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make predictions: `of` are class 2, of which `changed` become class 0, and `of_others` are class 1."""
    plain = torch.tensor([2] * of + [1] * of_others)
    edited = torch.tensor([0] * changed + [2] * (of - changed) + [2] * changed_others + [1] * (of_others - changed_others))
    return plain, edited


@pytest.mark.parametrize(
    ("counts", "low", "high"),  # Newcombe 1998, "Interval estimation for the difference between independent proportions", table II
    [
        ((56, 70, 48, 80), 0.0524, 0.3339),
        ((9, 10, 3, 10), 0.1705, 0.8090),
        ((6, 7, 2, 7), 0.0582, 0.8062),
        ((5, 56, 0, 29), -0.0381, 0.1926),
        ((0, 10, 0, 20), -0.1611, 0.2775),
        ((10, 10, 0, 20), 0.6791, 1.0000),
    ],
)
def test_rates_follow_their_definition_and_newcombes_intervals(counts: tuple[int, int, int, int], low: float, high: float) -> None:
    plain, edited = predictions(*counts)
    order = torch.randperm(len(plain), generator=torch.Generator().manual_seed(0))
    rates = change_rates(plain[order], edited[order], 2)
    changed, n_target, changed_others, n_other = counts
    assert (rates.n_target, rates.n_other) == (n_target, n_other)
    assert (rates.target.value, rates.other.value) == pytest.approx((changed / n_target, changed_others / n_other))
    expected = scipy.stats.binomtest(changed, n_target).proportion_ci(method="wilson")
    assert (rates.target.low, rates.target.high) == pytest.approx((expected.low, expected.high), abs=1e-8)
    assert rates.specificity.value == pytest.approx(changed / n_target - changed_others / n_other)
    assert (rates.specificity.low, rates.specificity.high) == pytest.approx((low, high), abs=6e-5)


def test_rates_of_a_class_that_is_never_predicted_are_undefined() -> None:
    rates = change_rates(*predictions(3, 10, 2, 10), target=7)
    assert math.isnan(rates.target.value) and math.isnan(rates.specificity.low) and rates.n_target == 0
    assert rates.other.value == 0.25


def test_patches_that_change_together_count_once() -> None:
    plain, edited = predictions(12, 40, 3, 30)
    images = torch.arange(70)
    alone = change_rates(plain, edited, 2)
    together = change_rates(plain.repeat_interleave(16), edited.repeat_interleave(16), 2, images.repeat_interleave(16))
    as_if_independent = change_rates(plain.repeat_interleave(16), edited.repeat_interleave(16), 2)
    assert together.target.value == alone.target.value
    assert (together.target.low, together.target.high) == pytest.approx((alone.target.low, alone.target.high), abs=0.005)
    assert as_if_independent.target.low > together.target.low + 0.05
    assert change_rates(*predictions(9, 9, 0, 9), 2, torch.arange(18) // 3).target == change_rates(*predictions(3, 3, 0, 3), 2).target


def test_patches_that_change_independently_count_each() -> None:
    plain = torch.full((1600,), 2)
    edited = torch.where(torch.rand(1600, generator=torch.Generator().manual_seed(0)) < 0.3, 0, 2)
    by_image, by_patch = (change_rates(plain, edited, 2, images).target for images in (torch.arange(1600) // 16, None))
    assert by_image.high - by_image.low == pytest.approx(by_patch.high - by_patch.low, rel=0.15)


def test_collateral_is_the_change_of_accuracy_on_silent_images() -> None:
    classes, plain, edited = (torch.randint(0, 3, (200,), generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    silent = torch.arange(200) % 3 > 0
    found = collateral(plain == classes, edited == classes, silent)
    before, after = (accuracy_score(classes[silent], of[silent]) for of in (plain, edited))
    assert (found.plain.value, found.edited.value, found.change.value) == pytest.approx((before, after, after - before))
    assert found.change.low < found.change.value < found.change.high and found.n == int(silent.sum())
    assert collateral(plain == classes, plain == classes, silent).change.low < 0  # No change in 133 images is not yet none at all.
    assert math.isnan(collateral(plain == classes, edited == classes, torch.zeros(200, dtype=torch.bool)).change.value)


@pytest.mark.parametrize(("gain", "loss"), [(0.02, 0.02), (0.05, 0.1), (0.3, 0.2)])
def test_the_interval_of_collateral_covers_the_truth(gain: float, loss: float) -> None:
    n, covered = 40, 0.0
    for gained, lost in product(range(n + 1), repeat=2):
        kept = n - gained - lost
        if kept < 0:
            continue
        logs = [count * math.log(p) for count, p in ((gained, gain), (lost, loss), (kept, 1 - gain - loss)) if count]
        probability = math.exp(gammaln(n + 1) - gammaln(gained + 1) - gammaln(lost + 1) - gammaln(kept + 1) + sum(logs))
        if probability < 1e-6:
            continue
        at = torch.arange(n)
        before, after = at >= gained, ~((at >= gained) & (at < gained + lost))
        change = collateral(before, after, torch.ones(n, dtype=torch.bool)).change
        covered += probability * (change.low <= gain - loss <= change.high)
    assert covered > 0.94


# Outputs that move


def test_movement_beyond_the_rest_equals_a_loop() -> None:
    plain, edited, texts = random(20, 6), random(20, 6, seed=1), random(4, 6, seed=2)

    def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
        return float(x.double() @ y.double() / (x.double().norm() * y.double().norm()))

    found = beyond_the_rest((unit(edited) - unit(plain)) @ unit(texts).T)
    for at in range(20):
        moved = [cosine(edited[at], text) - cosine(plain[at], text) for text in texts]
        for place in range(4):
            assert float(found[at, place]) == pytest.approx(moved[place] - (sum(moved) - moved[place]) / 3)
    assert (beyond_the_rest(torch.zeros(3, 2)) == 0).all()


def published_output_score(probabilities: torch.Tensor, tokens: list[int]) -> float:
    """Compute the score as the code of Arad et al. does, by sorting the whole vocabulary."""
    order = probabilities.argsort(descending=True).tolist()
    return (1 - min(order.index(token) for token in tokens) / len(order)) * max(float(probabilities[token]) for token in tokens)


def test_the_output_score_is_the_published_one_less_its_baseline() -> None:
    plain, edited = random(9, 50).double().log_softmax(1), (2 * random(9, 50, seed=1).double()).log_softmax(1)
    raised = raised_most((edited - plain).mean(0), k=5)
    rises = [float((edited[:, text] - plain[:, text]).mean()) for text in range(50)]
    assert raised.tolist() == sorted(range(50), key=rises.__getitem__, reverse=True)[:5]
    before, after = ([published_output_score(p, raised.tolist()) for p in log_p.exp()] for log_p in (plain, edited))
    assert output_score(plain, edited, raised).tolist() == pytest.approx([q - p for p, q in zip(before, after, strict=True)])
    assert (output_score(plain, plain, raised) == 0).all()
    assert len(raised_most((edited - plain).mean(0), k=100)) == 50


def test_an_edit_that_makes_a_text_certain_has_the_full_output_score() -> None:
    logits = torch.zeros(4, 100)
    logits[:, 7] = -20
    edited = logits.clone()
    edited[:, 7] = 40
    plain, edited = logits.log_softmax(1), edited.log_softmax(1)
    raised = raised_most((edited - plain).mean(0), k=1)
    assert raised.tolist() == [7]
    torch.testing.assert_close(output_score(plain, edited, raised), torch.ones(4, dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_steering_score_is_the_cosine_with_the_mean_image() -> None:
    images, texts = random(16, 8), random(5, 8, seed=1)
    torch.testing.assert_close(steering_score(images, texts).float(), cosine_similarity(images.mean(0)[None], texts))


def test_answer_shift_is_scipys_divergence() -> None:
    plain, edited = random(12, 30).double().log_softmax(1), random(12, 30, seed=1).double().log_softmax(1)
    found = answer_shift(plain, edited)
    assert found.tolist() == pytest.approx(scipy.stats.entropy(plain.exp().numpy(), edited.exp().numpy(), axis=1).tolist())
    assert (answer_shift(plain, plain) == 0).all()
    certain, open_ = torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.5, 0.5]]).log()
    assert answer_shift(certain, certain).tolist() == [0]
    assert answer_shift(certain, open_).tolist() == pytest.approx([math.log(2)])
    assert answer_shift(open_, certain).tolist() == [math.inf]


def test_log_odds_equal_their_definition() -> None:
    log_p = random(12, 30).double().log_softmax(1)
    p = log_p.exp()[:, [4, 9]].sum(1)
    torch.testing.assert_close(log_odds(log_p, torch.tensor([9, 4])), (p / (1 - p)).log())
    sure = torch.tensor([[0.0, -50.0]], dtype=torch.float64)
    assert log_odds(sure, torch.tensor([0])).tolist() == [50]


def test_drift_is_one_minus_the_cosine_and_none_if_nothing_changes() -> None:
    plain, edited = random(12, 30), random(12, 30, seed=1)
    torch.testing.assert_close(cosine_drift(plain, edited), 1 - cosine_similarity(plain.double(), edited.double()))
    assert (cosine_drift(plain, plain) == 0).all()


# Groups


def test_group_accuracies_equal_loops_and_count_what_is_left_out() -> None:
    classes, attributes, right = (
        torch.randint(0, 2 + (seed == 1), (300,), generator=torch.Generator().manual_seed(seed)) for seed in range(3)
    )
    attributes[:4], attributes[4:] = 9, attributes[4:]
    classes[:3], classes[3] = 0, 1
    found = group_accuracies(right.bool(), classes, attributes, least=10)
    expected = {}
    for group in product(range(2), range(3)):
        answers = [r for r, c, a in zip(right.tolist(), classes.tolist(), attributes.tolist(), strict=True) if (c, a) == group]
        expected[group] = sum(answers) / len(answers)
    assert {group: accuracy.value for group, accuracy in found.accuracy.items()} == pytest.approx(expected)
    assert found.worst == min(expected, key=lambda group: expected[group])
    assert (found.n_groups_left_out, found.n_images_left_out) == (2, 4)
    assert group_accuracies(right.bool(), classes, attributes, least=1000).worst is None


def test_removing_a_spurious_attribute_lifts_the_worst_group() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 2, (2000,), generator=generator)
    attributes = torch.where(torch.rand(2000, generator=generator) < 0.95, classes, 1 - classes)
    signal = 2 * classes - 1 + 1.2 * torch.randn(2000, generator=generator)
    shortcut = 2.0 * (2 * attributes - 1)
    before, after = (group_accuracies((score > 0).long() == classes, classes, attributes) for score in (signal + shortcut, signal))
    assert before.worst in ((0, 1), (1, 0))
    assert before.worst and after.accuracy[before.worst].low > before.accuracy[before.worst].high + 0.3


# Erasure


@given(seed=st.integers(0, 1000), n_concepts=st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_leace_leaves_no_covariance_with_the_concept_and_changes_least(seed: int, n_concepts: int) -> None:
    x = random(120, 6, seed=seed).double() @ random(6, 6, seed=seed + 1).double() + 3
    z = (x[:, :n_concepts] + random(120, n_concepts, seed=seed + 2)) > 3
    eraser = fit_leace(x, z)
    erased = eraser(x)
    centred, concept = x - x.mean(0), z.double() - z.double().mean(0)
    scale = float(centred.square().mean())
    assert float((erased.T @ concept / 120).abs().max()) < 1e-9 * scale
    torch.testing.assert_close(erased.mean(0), x.mean(0))
    torch.testing.assert_close(eraser(erased), erased)
    change = float((erased - x).square().sum(1).mean())
    # All affine maps without covariance are the best one plus some D with D Σxz = 0; a random D makes the change larger.
    covariance = centred.T @ concept
    away = torch.eye(6, dtype=torch.float64) - covariance @ torch.linalg.pinv(covariance)
    for trial in range(20):
        other = erased + centred @ (0.05 * random(6, 6, seed=trial).double() @ away).T
        assert float((other.T @ concept / 120).abs().max()) < 1e-8 * scale
        assert float((other - x).square().sum(1).mean()) > change


def test_leace_is_defined_if_activations_do_not_span_their_space() -> None:
    x = random(200, 3).double() @ random(3, 8, seed=1).double()
    z = (x[:, :1] > 0) | (random(200, 1, seed=2) > 1)
    erased = fit_leace(x, z)(x)
    assert float((erased.T @ (z.double() - z.double().mean(0))).abs().max()) < 1e-8
    assert torch.linalg.matrix_rank(erased - erased.mean(0), rtol=1e-9) == 2
    constant = torch.ones(200, 1, dtype=torch.bool)
    torch.testing.assert_close(fit_leace(x, constant)(x), x)


def make_concepts(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample activations of width 12 in which direction i carries concept i of 3, and a fourth concept that all images have."""
    y = torch.rand(n, 4, generator=torch.Generator().manual_seed(seed)) < torch.tensor([0.5, 0.3, 0.5, 1.0])
    x = 0.4 * random(n, 12, seed=seed + 1)
    x[:, :3] += y[:, :3].float()
    return x, y


def test_erasure_removes_the_concept_and_spares_the_others() -> None:
    (train, y_train), (test, y_test) = make_concepts(600, 0), make_concepts(600, 5)
    ablated = [x * (torch.arange(12) != 0) for x in (train, test)]
    found = erasures({"none": train, "targeted": ablated[0]}, {"none": test, "targeted": ablated[1]}, y_train, y_test, 0)
    assert list(found) == ["none", "targeted", "leace"]
    assert found["none"].concept > 0.85
    for arm in ("targeted", "leace"):
        assert found[arm].concept == pytest.approx(0.5, abs=0.06)
        assert found[arm].others == pytest.approx(found["none"].others, abs=0.02) and found[arm].others > 0.85


def test_suppression_that_leaves_a_copy_is_no_erasure() -> None:
    (train, y_train), (test, y_test) = make_concepts(600, 0), make_concepts(600, 5)
    for x in (train, test):
        x[:, 11] += 0.9 * x[:, 0]
    hidden = [x * (torch.arange(12) != 0) for x in (train, test)]
    found = erasures({"none": train, "targeted": hidden[0]}, {"none": test, "targeted": hidden[1]}, y_train, y_test, 0)
    assert found["targeted"].concept > 0.75
    assert found["leace"].concept == pytest.approx(0.5, abs=0.06)


def test_concepts_without_two_answers_are_left_out() -> None:
    (train, y_train), (test, y_test) = make_concepts(300, 0), make_concepts(300, 5)
    assert probe_accuracies(train, test, y_train, y_test).isnan().tolist() == [False, False, False, True]
    y_test[:, 1] = False
    found = erasures({"none": train}, {"none": test}, y_train, y_test, 1)["none"]
    assert math.isnan(found.concept) and found.others > 0.85
    assert math.isnan(erasures({"none": train}, {"none": test}, y_train[:, :1], y_test[:, :1], 0)["none"].others)


@given(st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=1, max_size=30), st.floats(0.01, 100))
def test_ablation_sparsity_is_a_number_of_latents(effects: list[float], scale: float) -> None:
    found = ablation_sparsity(torch.tensor(effects, dtype=torch.float64))
    n = sum(effect != 0 for effect in effects)
    assert math.isnan(found) if not n else 1 - 1e-9 <= found <= n + 1e-9
    assert ablation_sparsity(scale * torch.tensor([2.0, 0.0, -2.0, 2.0])) == pytest.approx(3)
    assert ablation_sparsity(torch.tensor([0.0, scale])) == pytest.approx(1)


# The status of a latent

WHOLE = StatusRule(drift=0.1, collateral=0.02)


def test_the_interval_against_one_control_is_that_of_a_paired_t_test() -> None:
    targeted, control = random(2, 40) + 1, random(2, 40, seed=1)
    found = best_control(targeted, {"diff_means": control}, level=0.02)
    for at in range(2):
        test: Any = scipy.stats.ttest_rel(targeted[at].double(), control[at].double())
        low, high = test.confidence_interval(0.98)
        middle = float(targeted[at].double().mean() - found.level_p[at])
        assert (middle - float(found.half_p[at]), middle + float(found.half_p[at])) == pytest.approx((low, high))
    assert found.arms == ("diff_means", "diff_means")


def test_the_best_control_is_the_arm_that_leaves_the_least_room() -> None:
    targeted, noise = torch.ones(2, 50), 0.01 * random(2, 50)
    controls = {"sign_flipped": -targeted + noise, "diff_means": torch.tensor([[0.5], [0.1]]) + noise, "untouched": 0.3 + noise}
    found = best_control(targeted, controls)
    assert found.arms == ("diff_means", "untouched")
    assert found.level_p.tolist() == pytest.approx([0.5, 0.3], abs=0.01)


@pytest.mark.parametrize("r", [2, 8, 20, 60])
def test_one_more_draw_rarely_exceeds_the_random_arm(r: int) -> None:
    draws = random(4000, r + 1).double()
    level = levels(draws[:, 1:])
    assert float((draws[:, 0] > level).double().mean()) == pytest.approx(0.025, abs=0.011)
    if r >= 20:  # Skewed populations need enough draws.
        assert float((draws[:, 0].exp() > levels(draws[:, 1:].exp())).double().mean()) < 0.055


def levels(draws: torch.Tensor) -> torch.Tensor:
    """Return the control level of random arms, `(arms, draws)`, whose effects are the same on all images."""
    targeted = torch.zeros(len(draws), 2)
    found: BestControl = best_control(targeted, {"random_latent": draws[:, :, None].expand(-1, -1, 2)})
    return found.level_p


def test_many_draws_make_a_random_arm_neither_stronger_nor_weaker() -> None:
    found = [float(levels(random(200, r, seed=r).double()).mean()) for r in (20, 40, 100, 1000)]
    assert found == pytest.approx([2.2] * 4, abs=0.3)  # The largest of 1,000 is 3.2 on average.


def curve(
    targeted: list[float], doses: tuple[float, ...] = (0.5, 1.0), drift: tuple[float, ...] = (0.0, 0.0), lost: Any = None, n: int = 100
) -> DoseCurve:
    """Make a curve with given mean effects and eight random latents around 0."""
    p = len(doses)
    effects = torch.tensor(targeted)[:, None] + 0.1 * random(p, n)
    controls = {"random_latent": 0.1 * random(p, 8, n, seed=1), "sign_flipped": -effects}
    return DoseCurve(torch.tensor(doses), effects, controls, torch.tensor(drift), None if lost is None else -torch.tensor(lost))


def test_an_effect_within_the_observed_range_is_causal() -> None:
    found = decide_status(curve([0.1, 0.4]), WHOLE)
    assert (found.status, found.dose, found.control) == ("causal", 1.0, "random_latent")
    assert found.effect == pytest.approx(0.4, abs=0.03)
    assert found.best_control < found.effect_low < found.effect < found.effect_high
    assert found.effect_high - found.effect == pytest.approx(found.effect - found.effect_low)


def test_a_latent_without_an_effect_only_reads() -> None:
    found = decide_status(curve([0.0, -0.3]), WHOLE)
    assert (found.status, found.dose) == ("reads_only", 0.5)
    assert found.effect_low <= found.best_control


def test_an_effect_of_a_stronger_dose_than_observed_does_not_count() -> None:
    found = decide_status(curve([0.0, 2.0], doses=(1.0, 2.0)), WHOLE)
    assert (found.status, found.dose) == ("reads_only", 1.0)


@pytest.mark.parametrize(
    ("drift", "lost", "status", "dose"),
    [
        ((0.0, 0.0), (0.0, 0.02), "causal", 1.0),
        ((0.0, 0.2), None, "causal", 0.5),
        ((0.0, 0.0), (0.01, 0.05), "causal", 0.5),
        ((0.2, 0.0), (0.0, 0.05), "breaks_model", 1.0),
        ((0.2, 0.2), (math.nan, math.nan), "breaks_model", 1.0),
        ((0.0, 0.0), (math.nan, math.nan), "causal", 1.0),
        ((0.0, math.nan), (0.0, 0.0), "causal", 0.5),
        ((math.nan, math.nan), (0.0, 0.0), "untested", math.nan),
    ],
)
def test_doses_that_harm_the_model_are_not_causal(drift: tuple[float, ...], lost: Any, status: str, dose: float) -> None:
    found = decide_status(curve([0.3, 0.5], drift=drift, lost=lost), WHOLE)
    assert (found.status, found.dose) == (status, pytest.approx(dose, nan_ok=True))


def test_without_enough_images_controls_or_measured_doses_a_latent_is_untested() -> None:
    strong = curve([0.3, 0.5])
    assert decide_status(curve([0.3, 0.5], n=19), WHOLE).status == "untested"
    assert decide_status(DoseCurve(strong.doses_p, strong.targeted_pn, {}, strong.drift_p), WHOLE).status == "untested"
    assert decide_status(curve([0.3, 0.5], doses=(2.0, 4.0)), WHOLE).status == "untested"
    unmeasured = decide_status(curve([math.nan, math.nan]), WHOLE)
    assert unmeasured.status == "untested" and math.isnan(unmeasured.effect) and math.isnan(unmeasured.best_control)


def test_more_doses_need_stronger_evidence() -> None:
    effects = 0.045 + 0.2 * random(100).expand(1, -1)
    effects = effects - effects.mean() + 0.045  # A difference of 0.045 with a standard error of 0.02 is significant at 5 %, not at 1 %.
    for n_doses, status in ((1, "causal"), (5, "reads_only")):
        doses = torch.linspace(0.2, 1, n_doses)
        one = DoseCurve(doses, effects.repeat(n_doses, 1), {"untouched": torch.zeros(n_doses, 100)}, torch.zeros(n_doses))
        assert decide_status(one, WHOLE).status == status


def share_causal(latents: int, draws: int, images: int, spread: float, skewed: bool = False, effect: float = 0.0) -> float:
    """Return the share of latents called causal if targeted and random latents have true effects from one population.

    The effects differ between latents with a standard deviation of `spread`, and between images with one of 1; both rise with the dose.
    The targeted latent has an additional `effect`.
    """
    generator, doses = torch.Generator().manual_seed(draws + images), torch.tensor([0.5, 1.0])
    n_causal = 0
    for _ in range(latents):
        true = torch.randn(1 + draws, 1, generator=generator)
        true = spread * (true.exp() if skewed else true)
        true[0] += effect
        of_image = true + torch.randn(1 + draws, images, generator=generator) + 0.5 * torch.randn(images, generator=generator)
        effects = doses[:, None, None] * of_image + 0.2 * torch.randn(2, 1 + draws, images, generator=generator)
        controls = {"random_latent": effects[:, 1:], "sign_flipped": -effects[:, 0]}
        n_causal += decide_status(DoseCurve(doses, effects[:, 0], controls, torch.zeros(2)), WHOLE).status == "causal"
    return n_causal / latents


@pytest.mark.parametrize(
    ("draws", "spread", "skewed"),
    [(8, 0.0, False), (8, 0.3, False), (8, 3.0, False), (20, 3.0, True)],
    ids=["images alone differ", "latents differ somewhat", "latents differ much", "a few latents are strong"],
)
def test_at_most_one_random_latent_in_twenty_is_causal(draws: int, spread: float, skewed: bool) -> None:
    assert share_causal(2000, draws, 100, spread, skewed) <= 0.05


@pytest.mark.parametrize("rare", [True, False], ids=["predictions that rarely change", "skewed effects"])
def test_a_latent_that_equals_its_only_control_on_average_is_rarely_causal(rare: bool) -> None:
    generator, n_causal, dose = torch.Generator().manual_seed(0), 0, torch.ones(1)
    for _ in range(2000):
        drawn = torch.rand(2, 60, generator=generator)
        effects = (drawn < 0.04).float() if rare else -drawn.log()
        n_causal += decide_status(DoseCurve(dose, effects[:1], {"untouched": effects[1:]}, torch.zeros(1)), WHOLE).status == "causal"
    assert 0 < n_causal / 2000 <= 0.035


def test_a_planted_effect_is_found() -> None:
    assert share_causal(200, 8, 100, spread=0.1, effect=1.5) >= 0.99


def test_probes_from_a_start_are_those_from_nothing() -> None:
    y = random(200, 3).argmax(1)[:, None] == torch.arange(3)
    x = random(200, 12, seed=1) + 2 * y.double() @ random(3, 12, seed=2).double()
    nearly = x + 0.1 * random(200, 12, seed=3)
    start = fit_probes(x, y)
    torch.testing.assert_close(fit_probes(nearly, y, start).scores(x), fit_probes(nearly, y).scores(x), rtol=1e-4, atol=1e-4)
