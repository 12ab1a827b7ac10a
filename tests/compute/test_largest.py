"""Proves that the largest values of a row are those of a full sort, and that of equal ones the lower column is taken, also as the last."""

import numpy as np
import pytest

from ommatid.compute.largest import largest


@pytest.mark.parametrize("n_values", [2, 5, 10**6], ids=["ties everywhere", "some ties", "none"])
@pytest.mark.parametrize("n", [1, 7, 40, 99])
def test_equals_a_stable_sort(n: int, n_values: int) -> None:
    values = np.random.default_rng(n).integers(n_values, size=(200, 40)).astype(np.float32)
    assert (largest(values, n) == np.argsort(-values, axis=1, kind="stable")[:, :n]).all()


def test_of_nothing_there_is_nothing() -> None:
    assert largest(np.empty((3, 0)), 2).shape == (3, 0)
    assert largest(np.ones((3, 2)), 0).shape == (3, 0)
