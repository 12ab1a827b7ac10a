"""Proves that nearest directions equal those of the whole matrix, and that the lower index comes first among equals."""

import numpy as np
import pytest
import torch

from ommatid.compute import nearest as module
from ommatid.compute.nearest import UnitRows, largest, nearest, nearest_both_ways


@pytest.mark.parametrize("n_values", [2, 5, 10**6], ids=["ties everywhere", "some ties", "none"])
@pytest.mark.parametrize("n", [1, 7, 40, 99])
def test_nearest_directions_equal_a_stable_sort(n: int, n_values: int) -> None:
    values = np.random.default_rng(n).integers(n_values, size=(200, 40)).astype(np.float32)
    assert (largest(values, n) == np.argsort(-values, axis=1, kind="stable")[:, :n]).all()


def test_no_directions_or_no_neighbours_give_empty_results() -> None:
    assert largest(np.empty((3, 0)), 2).shape == (3, 0)
    assert largest(np.ones((3, 2)), 0).shape == (3, 0)


@pytest.mark.parametrize("tile", [3, 7, 4096])
@pytest.mark.parametrize("n", [1, 4])
def test_tiles_give_the_same_as_the_whole_matrix(monkeypatch: pytest.MonkeyPatch, tile: int, n: int) -> None:
    monkeypatch.setattr(module, "TILE", tile)
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((20, 6)).astype(np.float32)
    directions[5] = 3 * directions[17]
    rows = UnitRows(20, lambda rows: directions[rows])
    own = np.array([0, 5, 17, 19])
    queries = UnitRows(4, lambda rows: directions[own[rows]])
    allowed = rng.random((4, 20)) < 0.7
    cosines = np.where(allowed, queries[:] @ rows[:].T, -np.inf)
    cosines[np.arange(4), own] = -np.inf
    found = nearest(queries, rows, n, own, allowed)
    assert (found.others == np.argsort(-cosines, axis=1, kind="stable")[:, :n]).all()
    np.testing.assert_allclose(found.cosines, -np.sort(-cosines, axis=1)[:, :n], rtol=1e-6)


def test_tensors_are_accepted_and_both_directions_equal_the_whole_matrix() -> None:
    a, b = (torch.nn.functional.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(n)), dim=1) for n in (30, 20))
    there, back = nearest_both_ways(a, b)
    cosines = a @ b.T
    assert torch.equal(torch.from_numpy(there.cosines[:, 0]), cosines.amax(1))
    assert torch.equal(torch.from_numpy(back.others[:, 0]), cosines.argmax(0))


def test_the_cosine_is_minus_infinity_if_no_direction_is_allowed() -> None:
    assert nearest(np.eye(1), np.eye(1), 1, np.arange(1)).cosines.tolist() == [[-np.inf]]
    assert nearest(np.eye(2), np.eye(2), 0).others.shape == (2, 0)
