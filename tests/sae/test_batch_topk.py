"""Proves that the sparse step gives the dense definition's loss and gradients, and that selection is exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ommatid.sae.batch_topk import Weights, compute_step, select

D_MODEL, D_SAE, N_TOKENS, K = 12, 40, 30, 4


def make_weights(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL, generator=generator, dtype=torch.float64), dim=1)
    W_enc = W_dec + 0.1 * torch.randn(D_SAE, D_MODEL, generator=generator, dtype=torch.float64)
    b_enc = 0.1 * torch.randn(D_SAE, generator=generator, dtype=torch.float64)
    b_dec = 0.1 * torch.randn(D_MODEL, generator=generator, dtype=torch.float64)
    return Weights(W_enc, b_enc, W_dec, b_dec)


def dense_loss(weights: Weights, x: torch.Tensor, dead: torch.Tensor, aux_coefficient: float) -> torch.Tensor:
    """The definition, by autograd over dense matrices."""
    pre_acts = (x - weights.b_dec) @ weights.W_enc.T + weights.b_enc
    flat = pre_acts.relu().flatten()
    keep = torch.zeros_like(flat).scatter_(0, flat.topk(K * len(x)).indices, 1.0)
    acts = (flat * keep).view_as(pre_acts)
    x_hat = acts @ weights.W_dec + weights.b_dec
    loss = (x_hat - x).square().sum(1).mean()
    if not dead.any() or aux_coefficient == 0:
        return loss
    residual = (x - x_hat).detach()
    k_aux = D_MODEL // 2
    n_dead = int(dead.sum())
    of_dead = pre_acts[:, dead]
    top = of_dead.topk(min(k_aux, n_dead), dim=1)
    aux_acts = torch.zeros_like(of_dead).scatter(1, top.indices, top.values.relu())
    aux = (aux_acts @ weights.W_dec[dead] - residual).square().sum(1).mean()
    variance = (residual - residual.mean(0)).square().sum(1).mean()
    return loss + aux_coefficient * min(n_dead / k_aux, 1.0) * aux / variance


@pytest.mark.parametrize("n_dead", [0, 3, 20])
def test_sparse_gradients_equal_the_dense_definition(n_dead: int) -> None:
    x = torch.randn(N_TOKENS, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[:n_dead] = True
    oracle, sparse = make_weights(0), make_weights(0)
    for tensor in oracle.all():
        tensor.requires_grad_()
    loss = dense_loss(oracle, x, dead, 1 / 32)
    loss.backward()
    step = compute_step(sparse, x, K, 0.3, dead, 1 / 32)
    assert step.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    assert len(step.active.acts) == K * N_TOKENS
    for mine, theirs in zip(sparse.all(), oracle.all(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-12)


@given(seed=st.integers(0, 1000), floor=st.floats(-1, 3), n=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_selection_does_not_depend_on_the_guess(seed: int, floor: float, n: int) -> None:
    pre_acts = torch.randn(10, 30, generator=torch.Generator().manual_seed(seed))
    active = select(pre_acts, n, floor)
    positive = pre_acts[pre_acts > 0]
    expected = positive.sort(descending=True).values[:n]
    assert torch.equal(active.acts.sort(descending=True).values, expected)
    assert torch.equal(pre_acts[active.rows, active.latents], active.acts)
    assert bool((active.rows.diff() >= 0).all())
