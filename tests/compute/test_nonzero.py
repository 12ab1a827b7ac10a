"""Proves that the fast ways to find and count nonzero entries agree with the plain ones for every shape, layout and type."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ommatid.compute.nonzero import count_positive, positive, true_at


@given(rows=st.integers(0, 9), columns=st.integers(1, 40), share=st.sampled_from([0.0, 0.02, 0.5, 1.0]), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_nonzero_entries_are_found_in_order(rows: int, columns: int, share: float, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < share
    for one in (mask, mask.T):
        assert torch.equal(true_at(one), one.flatten().nonzero()[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_counts_are_exact_for_every_type(dtype: torch.dtype) -> None:
    x = torch.randn(5001, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    x[0], x[1], x[:, 2] = float("nan"), 0.0, 1.0
    assert torch.equal(count_positive(x), (x > 0).long().sum(0))
    assert torch.equal(positive(x).bool(), x > 0)
