"""Proves that selection is exact for every guess, density, arithmetic and number of processes that share a batch."""

import multiprocessing as mp
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ommatid.sae import distributed, select
from ommatid.sae.entries import Levels, Sparse
from ommatid.sae.select import Scorer, select_above, select_batch, select_token
from ommatid.sae.weights import Weights
from support.processes import HANG_SECONDS

D_MODEL, D_SAE, N_TOKENS = 6, 32, 24


def make_scorer(seed: int, dtype: torch.dtype = torch.float32, n_tokens: int = N_TOKENS, d_sae: int = D_SAE) -> Scorer:
    generator = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(d_sae, D_MODEL, generator=generator)
    weights = Weights(W_enc, 0.1 * torch.randn(d_sae, generator=generator), W_enc.clone(), torch.zeros(D_MODEL))
    return Scorer(weights, torch.randn(n_tokens, D_MODEL, generator=generator), Levels((d_sae,)), dtype)


def matrix(found: object) -> torch.Tensor:
    assert isinstance(found, Sparse)
    assert bool((found.rows.diff() >= 0).all())
    assert bool((found.latents.diff()[found.rows.diff() == 0] > 0).all())
    return torch.zeros(found.n_tokens, found.levels.bounds[-1]).index_put_((found.rows, found.latents), found.values)


@given(seed=st.integers(0, 1000), floor=st.floats(-1, 5), k=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_batch_selection_does_not_depend_on_the_guess(seed: int, floor: float, k: int) -> None:
    scorer = make_scorer(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "DENSE_SHARE", 100.0)
        entries, threshold = select_batch(scorer, k, floor)
    pre_acts = scorer.dense()
    expected = pre_acts[pre_acts > 0].sort(descending=True).values[: k * N_TOKENS]
    found = matrix(entries)
    torch.testing.assert_close(found[found > 0].sort(descending=True).values, expected)
    assert threshold == pytest.approx(float(expected[-1]))


@given(seed=st.integers(0, 1000), floor=st.floats(0, 5), k=st.integers(1, 31))
@settings(max_examples=60, deadline=None)
def test_token_selection_does_not_depend_on_the_guess(seed: int, floor: float, k: int) -> None:
    scorer = make_scorer(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "DENSE_SHARE", 100.0)
        entries, next_floor = select_token(scorer, k, floor)
    pre_acts = scorer.dense().relu()
    top = pre_acts.topk(k, dim=1)
    torch.testing.assert_close(matrix(entries), torch.zeros_like(pre_acts).scatter(1, top.indices, top.values))
    assert next_floor >= 0


def test_a_good_guess_leaves_few_candidates() -> None:
    scorer = make_scorer(0, n_tokens=600, d_sae=256)
    _, threshold = select_batch(scorer, 4, 0.0)
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Scorer, "above", lambda self, floor, above=Scorer.above: seen.append(len((found := above(self, floor)).values)) or found
        )
        select_batch(scorer, 4, select.FLOOR_SHARE * threshold)
    assert seen == [seen[0]] and 4 * 600 <= seen[0] < 3 * 4 * 600


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d_out", [160, 70, 20], ids=["room for all", "room for some", "room for nothing"])
def test_weights_are_unchanged_although_gradients_serve_as_buffers(d_out: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(41, 160, generator=generator), torch.randn(41, d_out, generator=generator)
    weights = Weights(W_enc, torch.randn(41, generator=generator), W_dec, torch.zeros(d_out))
    before = [tensor.clone() for tensor in weights.tensors().values()]
    for floor in (torch.tensor(10.0), 10 + torch.rand(300, 1, generator=generator), torch.tensor(-1.0)):
        scorer = Scorer(weights, torch.randn(300, 160, generator=generator), Levels((41,)), dtype)
        products, bound = scorer.inputs_bd.to(dtype) @ W_enc.to(dtype).T, floor.to(dtype) - weights.b_enc.to(dtype)
        expected = torch.where(products > bound, products.float() + weights.b_enc, 0)
        torch.testing.assert_close(matrix(scorer.above(floor)), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
    assert all(map(torch.equal, before, weights.tensors().values()))


@pytest.mark.parametrize("n_tokens", [1, 15, 64, 65, 300])
def test_the_largest_values_of_selected_tokens_are_found(n_tokens: int) -> None:
    scorer = make_scorer(4, n_tokens=300)
    tokens = torch.arange(300).flip(0)[:n_tokens]
    values, latents = scorer.largest(tokens, 20)
    expected = scorer.dense()[tokens]
    torch.testing.assert_close(values.sort(descending=True).values, expected.sort(descending=True).values[:, :20])
    torch.testing.assert_close(values, expected.gather(1, latents))


def test_only_tokens_with_too_few_candidates_are_searched_again() -> None:
    scorer = make_scorer(5, n_tokens=300, d_sae=256)
    pre_acts, lengths = scorer.dense(), scorer.inputs_bd.norm(dim=1)
    top = pre_acts.topk(4, dim=1)
    seen: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "largest", lambda self, tokens, k, largest=Scorer.largest: seen.append(tokens) or largest(self, tokens, k))
        entries, _ = select_token(scorer, 4, 1.75)
    short = (top.values[:, -1] <= 1.75 * lengths).nonzero()[:, 0]
    assert 0 < len(short) < 30
    assert len(seen) == 1 and torch.equal(seen[0], short)
    torch.testing.assert_close(matrix(entries), torch.zeros_like(pre_acts).scatter(1, top.indices, top.values))


@pytest.mark.parametrize("floor", [0.5, 0.0, -0.5])
def test_values_above_a_threshold_are_selected(floor: float) -> None:
    scorer = make_scorer(3, n_tokens=300)
    pre_acts = scorer.dense()
    of_latents = floor + 0.3 * torch.rand(D_SAE)
    for wanted in (torch.tensor(floor), of_latents):
        torch.testing.assert_close(matrix(scorer.above(wanted)), pre_acts * (pre_acts > wanted))
    sparse = select_above(scorer, torch.tensor(4.0))
    assert isinstance(sparse, Sparse) and not isinstance(select_above(scorer, torch.tensor(-4.0)), Sparse)


def test_bfloat16_selects_nearly_the_same() -> None:
    exact, rounded = make_scorer(1, n_tokens=300), make_scorer(1, torch.bfloat16, n_tokens=300)
    found, expected = (matrix(select_batch(scorer, 2, 0.5)[0]) for scorer in (rounded, exact))
    assert float(((found > 0) == (expected > 0)).float().mean()) > 0.99
    both = (found > 0) & (expected > 0)
    torch.testing.assert_close(found[both], expected[both], rtol=0.02, atol=0.02)


def _of_rank(rank: int, port: int, n_ranks: int, wanted: Sequence[int], where: Path) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(n_ranks),
        "LOCAL_RANK": str(rank),
    }
    with distributed.process_group():
        distributed.agree_to_train()
        values = values_of(rank)
        for n_wanted in wanted:
            keep, border = distributed.keep_largest(values, n_wanted)
            assert keep is not None
            found = {"kept": values[keep], "border": torch.tensor(border), "total": torch.tensor(distributed.total(rank + 1))}
            torch.save(found, where / f"{rank}-{n_wanted}.pt")


def values_of(rank: int) -> torch.Tensor:
    return torch.randint(0, 20, (100 + 30 * rank,), generator=torch.Generator().manual_seed(rank)).float()


def test_ranks_agree_on_the_largest_with_ties(tmp_path: Path) -> None:
    wanted = (1, 77, 229)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context: Any = mp.get_context("spawn")
    processes = [context.Process(target=_of_rank, args=(rank, port, 2, wanted, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANG_SECONDS)
        assert process.exitcode == 0
    for n_wanted in wanted:
        found = [torch.load(tmp_path / f"{rank}-{n_wanted}.pt", weights_only=True) for rank in range(2)]
        everyone = torch.cat([values_of(rank) for rank in range(2)]).sort(descending=True).values[:n_wanted]
        kept = torch.cat([one["kept"] for one in found]).sort(descending=True).values
        assert torch.equal(kept, everyone)
        assert {float(one["border"]) for one in found} == {float(everyone[-1])}
        assert {int(one["total"]) for one in found} == {3}
