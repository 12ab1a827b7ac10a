"""Proves the metrics of structure and meaning against their definitions as slow loops, scikit-learn, and planted truths."""

import importlib
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ommatid.metrics import (
    CoFiring,
    Fidelity,
    FidelityByKind,
    Firing,
    coverage,
    density_histogram,
    fit_probes,
    label_entropy,
    lca_depth,
    purity,
    uniqueness,
)
from ommatid.metrics.probe import PENALTY


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sets_of(fires: torch.Tensor) -> list[set[int]]:
    """Return the set of images of each latent."""
    return [set(fires[:, latent].nonzero()[:, 0].tolist()) for latent in range(fires.shape[1])]


@given(seed=st.integers(0, 50), cut=st.integers(0, 60))
@settings(max_examples=10, deadline=None)
def test_cofiring_equals_sets_of_images_and_merges(seed: int, cut: int) -> None:
    fires = (random(60, 7, seed=seed) > 0.4).float()
    fires[:, 3] = 0  # never
    sets, tile = sets_of(fires), range(2, 6)
    one, other = CoFiring(tile, 7), CoFiring(tile, 7)
    one.add(fires[:cut])
    other.add(fires[cut:])
    one.merge(other)
    lift, jaccard = one.lift(slice(0, 4), 60), one.jaccard(slice(0, 4))
    for row, latent in enumerate(tile):
        for b in range(7):
            both, either = len(sets[latent] & sets[b]), len(sets[latent] | sets[b])
            assert one.counts[row, b] == both
            assert float(jaccard[row, b]) == (pytest.approx(both / either) if either else 0)
            if sets[latent] and sets[b]:
                assert float(lift[row, b]) == pytest.approx(both * 60 / len(sets[latent]) / len(sets[b]))
            else:
                assert math.isnan(lift[row, b])


@given(seed=st.integers(0, 50))
@settings(max_examples=10, deadline=None)
def test_uniqueness_equals_pairs_of_sets(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.stack([torch.randperm(12, generator=generator)[:4] for _ in range(20)])
    images[7, 3] = -1  # fires on three images
    images[8:10] = torch.tensor([100, 101, 102, 103])  # the same, and no other's
    found = uniqueness(images)
    for latent in range(20):
        mine = set(images[latent].tolist())
        others = [set(images[b].tolist()) for b in range(20) if b not in (latent, 7)]
        best = max(len(mine & other) / len(mine | other) for other in others)
        assert math.isnan(found[latent]) if latent == 7 else float(found[latent]) == pytest.approx(1 - best)
    assert found[8:10].tolist() == [0, 0]


def test_uniqueness_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.stack([torch.randperm(30, generator=torch.Generator().manual_seed(i))[:5] for i in range(23)])
    whole = uniqueness(images)
    monkeypatch.setattr(importlib.import_module("ommatid.metrics.overlap"), "LATENTS_PER_STEP", 4)
    assert torch.equal(uniqueness(images), whole)


def test_latents_that_share_no_images_are_unique_and_so_is_a_single_latent() -> None:
    assert uniqueness(torch.arange(12).view(3, 4)).tolist() == [1, 1, 1]
    assert uniqueness(torch.arange(4).view(1, 4)).tolist() == [1]
    assert uniqueness(torch.full((2, 4), -1)).isnan().all()


names = st.lists(st.sampled_from("abc"), max_size=4)


@given(st.lists(names, min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_lca_depth_is_the_length_of_the_common_prefix(paths: list[list[str]]) -> None:
    longest = max(n for n in range(5) if all(len(path) >= n and path[:n] == paths[0][:n] for path in paths))
    assert lca_depth(paths) == longest


@given(st.lists(st.floats(0, 9), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_label_entropy_equals_its_definition(mass: list[float]) -> None:
    total = sum(mass)
    found = label_entropy(np.array(mass))
    if total == 0:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(sum(-m / total * math.log2(m / total) for m in mass if m / total > 0), abs=1e-9)
        assert math.copysign(1, found) == 1


def test_entropy_of_one_class_is_zero_and_of_four_equal_ones_two_bits() -> None:
    assert label_entropy(np.array([0, 3.0])) == 0
    assert label_entropy(np.ones(4)) == pytest.approx(2)


def test_coverage_counts_the_classes_of_pure_latents() -> None:
    labels = [list("aaab"), list("bbcc"), list("ccc"), list("aaaa"), list("dddd")]
    pure = {Counter(own).most_common(1)[0][0] for own, share in zip(labels, purity(labels, 4), strict=True) if share >= 0.75}
    assert pure == {"a", "d"}
    assert coverage(labels, 4, 5) == 2 / 5
    assert math.isnan(coverage(labels, 4, 0))


def test_decades_hold_every_latent_once() -> None:
    density = torch.tensor([0.0, 0.0, 1e-3, 5e-3, 0.01, 0.0999, 0.1, 1.0], dtype=torch.float64)
    found = density_histogram(density, 1000)
    assert [(round(d.low, 9), round(d.high, 9), d.n_latents) for d in found] == [(0, 0, 2), (1e-3, 0.01, 2), (0.01, 0.1, 2), (0.1, 1, 2)]
    assert sum(d.n_latents for d in density_histogram(torch.rand(100) ** 4, 12345)) == 100
    assert sum(d.n_latents for d in density_histogram(torch.zeros(3), 0)) == 3


def test_dense_and_rare_latents_are_flagged_by_density() -> None:
    firing = Firing(4)
    acts = torch.zeros(100, 4)
    acts[:11, 0] = acts[:10, 1] = acts[:16, 2] = 1  # of latent 3 nothing
    firing.add(acts, acts)
    assert firing.is_dense.tolist() == [True, False, True, False]
    assert firing.is_rare.tolist() == [True, True, False, False]


def test_fidelity_by_kind_is_computed_over_the_tokens_of_that_kind() -> None:
    x, error = random(20, 4, 6) * 3 + 2, random(20, 4, 6, seed=1)
    acts = random(20, 4, 9, seed=2).relu()
    kinds = ["cls", "patch", "register", "patch"]
    found = FidelityByKind(kinds)
    for rows in (slice(0, 7), slice(7, 20)):
        found.add(x[rows], x[rows] + error[rows], acts[rows])
    for kind, tokens in {"cls": [0], "patch": [1, 3], "register": [2], "all": [0, 1, 2, 3]}.items():
        direct, mine = Fidelity(), found.whole if kind == "all" else found.of[kind]
        fired = int((acts[:, tokens] > 0).sum())
        direct.add(x[:, tokens].flatten(0, 1).double(), (x + error)[:, tokens].flatten(0, 1).double(), fired)
        assert (mine.n, mine.l0) == (20 * len(tokens), fired / 20 / len(tokens))
        assert mine.fvu == pytest.approx(direct.fvu, rel=1e-6)
        assert mine.cosine == pytest.approx(direct.cosine, rel=1e-6)


@pytest.mark.parametrize("d", [1, 3, 40])
def test_probes_equal_scikit_learn(d: int) -> None:
    x, classes = random(300, d) * 5 + 7, torch.randint(0, 4, (300,), generator=torch.Generator().manual_seed(1))
    x[:, 0] += 3 * classes
    y = torch.nn.functional.one_hot(classes, 4).bool()
    scores = fit_probes(x, y).scores(x)
    scaled = StandardScaler().fit_transform(x.double().numpy())
    for c in range(4):
        model = LogisticRegression(C=1 / (PENALTY * len(x)), class_weight="balanced", tol=1e-9, max_iter=2000)
        theirs = model.fit(scaled, y[:, c]).decision_function(scaled)
        np.testing.assert_allclose(scores[:, c].numpy(), theirs, atol=2e-4)


def test_the_probe_of_a_class_does_not_depend_on_other_classes() -> None:
    own, classes = random(200, 3, 2), torch.randint(0, 3, (200,), generator=torch.Generator().manual_seed(1))
    own[:, :, 1] = 4  # does not vary
    y = torch.nn.functional.one_hot(classes, 3).bool()
    together = fit_probes(own, y).scores(own)
    for c in range(3):
        torch.testing.assert_close(together[:, c], fit_probes(own[:, c], y[:, c : c + 1]).scores(own[:, c])[:, 0], atol=1e-4, rtol=0)


def test_probes_find_a_rare_class_at_threshold_zero() -> None:
    x = random(1000, 5)
    y = torch.zeros(1000, 1, dtype=torch.bool)
    y[:20] = True
    x[:20, 2] += 6
    scores = fit_probes(x, y).scores(x)[:, 0]
    assert (scores[:20] > 0).float().mean() > 0.9 < (scores[20:] <= 0).float().mean()


def test_probes_that_separate_perfectly_stay_finite() -> None:
    x = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    y = torch.tensor([[True], [True], [False], [False]])
    assert fit_probes(x, y).scores(x).isfinite().all()
    for a, b in itertools.product(range(2), range(2, 4)):
        assert fit_probes(x, y).scores(x)[a] > fit_probes(x, y).scores(x)[b]
