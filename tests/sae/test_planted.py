"""Proves that planted data have the planted structure, and that MMCS is 1 for the planted directions and nothing else."""

from collections.abc import Callable

import pytest
import torch

from support.planted import Planted, make_correlated, make_hierarchical, make_planted, mmcs

MAKERS = (make_planted, make_correlated, make_hierarchical)


@pytest.mark.parametrize("make", MAKERS)
def test_tokens_are_codes_times_directions_and_an_offset(make: Callable[..., Planted]) -> None:
    planted = make(500)
    assert (planted.codes >= 0).all()
    torch.testing.assert_close(planted.directions.norm(dim=1), torch.ones(len(planted.directions)))
    rest = planted.x - planted.codes @ planted.directions
    torch.testing.assert_close(rest, rest[:1].expand_as(rest), rtol=0, atol=1e-4)


@pytest.mark.parametrize("make", MAKERS)
def test_the_seed_decides_everything_and_noise_is_added(make: Callable[..., Planted]) -> None:
    one, same, other, noisy = make(4000), make(4000), make(4000, seed=1), make(4000, noise=0.5)
    assert torch.equal(one.x, same.x)
    assert not torch.equal(one.x, other.x)
    assert float((noisy.x - one.x).std()) == pytest.approx(0.5, rel=0.02)


def test_k_features_fire_per_token() -> None:
    assert set((make_planted(300, k=4).codes > 0).sum(1).tolist()) == {4}


def test_pairs_fire_together_and_others_by_chance() -> None:
    fires = (make_correlated(40_000).codes > 0).double()
    together = fires.T @ fires / len(fires)
    torch.testing.assert_close(together.diagonal(), torch.full((48,), 0.05, dtype=torch.float64), rtol=0, atol=0.005)
    assert float(together[0::2, 1::2].diagonal().min()) > 8 * 0.05**2
    assert float(together[0, 2:].max()) < 2 * 0.05**2


def test_a_child_fires_only_with_its_parent_and_without_its_siblings() -> None:
    fires = make_hierarchical(20_000).codes > 0
    parents, children = fires[:, :8], fires[:, 8:].unflatten(1, (8, 4))
    assert not (children.any(2) & ~parents).any()
    assert int(children.sum(2).max()) == 1
    assert float(parents.double().mean()) == pytest.approx(0.2, abs=0.01)
    assert float(children.any(2)[parents].double().mean()) == pytest.approx(0.8, abs=0.01)


def test_mmcs_is_1_for_the_planted_directions_alone() -> None:
    planted = make_planted(2).directions
    shuffled = 3 * planted[torch.randperm(len(planted), generator=torch.Generator().manual_seed(1))]
    assert mmcs(shuffled, planted) == pytest.approx(1)
    assert mmcs(torch.cat([shuffled, -planted]), planted) == pytest.approx(1)
    assert mmcs(-torch.eye(4), torch.eye(4)) == pytest.approx(0)  # signs count: the matching takes cosine 0 over -1
    assert mmcs(torch.eye(4)[:1], torch.eye(4)) == pytest.approx(1 / 4)  # not found is 0
    assert mmcs(torch.eye(4)[[0, 0, 0, 1]], torch.eye(4)) == pytest.approx(2 / 4)  # one direction stands for one feature
