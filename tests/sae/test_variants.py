"""Proves that the loss and gradients of each variant, sparse and dense, equal those of its dense definition.

The oracles are written with autograd over dense float64 matrices, straight from the papers' formulas.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ommatid.config import Imported, TrainParams
from ommatid.sae import entries, select
from ommatid.sae.entries import Dense, Levels, Sparse
from ommatid.sae.step import Batch, add_aux
from ommatid.sae.variants import Guides, Settings, Variant, make_variant
from ommatid.sae.weights import Weights

D_MODEL, D_OUT, D_SAE, N_TOKENS, K = 12, 9, 40, 30, 4
N_DEAD = 6
LEVELS = (5, 10, 20, 40)


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_weights(transcoder: bool = False) -> Weights:
    W_dec = normalize(seeded(0, D_SAE, D_OUT if transcoder else D_MODEL), dim=1)
    W_enc = seeded(1, D_SAE, D_MODEL) / 3 if transcoder else W_dec + 0.1 * seeded(1, D_SAE, D_MODEL)
    fixed = {"b_pre": 0.3 * seeded(4, D_MODEL)} if transcoder else {}
    return Weights(W_enc, 0.1 * seeded(2, D_SAE), W_dec, 0.1 * seeded(3, W_dec.shape[1]), fixed=fixed)


def make_batch(transcoder: bool = False) -> Batch:
    x = seeded(5, N_TOKENS, D_MODEL)
    return Batch(x, seeded(6, N_TOKENS, D_OUT) if transcoder else x, normalize(seeded(7, N_TOKENS, 5), dim=1))


def make(kind: dict[str, Any], ms_weight: float = 0.0) -> Variant:
    params = TrainParams.model_validate(PARAMS | {"variant": kind})
    settings = Settings(K, D_SAE, 100, 10_000, 0, 1 / 32, ms_weight, torch.float32, torch.device("cpu"))
    assert not isinstance(params.variant, Imported)
    return make_variant(params.variant, settings)


PARAMS: dict[str, Any] = {
    "hookpoint": None, "target": None, "d_sae": D_SAE, "k": K, "epochs": 1, "batch_size": N_TOKENS, "lr": None, "aux_coefficient": 0,
    "ms_weight": 0, "patience": None, "seed": 0, "max_dead": 1, "runs": [], "grid": {},
}  # fmt: skip


class Oracle:
    """The definition of a variant over leaf tensors."""

    def __init__(self, weights: Weights, batch: Batch, guides: Guides, ms_weight: float) -> None:
        self.leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.trained().items()}
        self.pre_bias = weights.fixed.get("b_pre", self.leaves["b_dec"])
        self.inputs = batch.x - self.pre_bias
        self.batch, self.guides, self.ms_weight = batch, guides, ms_weight
        self.pre = self.inputs @ self.leaves["W_enc"].T + self.leaves["b_enc"]

    def decode(self, acts: Tensor, W_dec: Tensor | None = None) -> Tensor:
        return acts @ (self.leaves["W_dec"] if W_dec is None else W_dec) + self.leaves["b_dec"]

    def error(self, x_hat: Tensor) -> Tensor:
        return (x_hat - self.batch.target).square().sum(1).mean()

    def aux(self, x_hat: Tensor, dead: Tensor) -> Tensor:
        residual = (self.batch.target - x_hat).detach()
        k_aux = residual.shape[1] // 2
        of_dead = self.pre[:, dead]
        top = of_dead.topk(min(k_aux, len(dead)), dim=1)
        acts = torch.zeros_like(of_dead).scatter(1, top.indices, top.values.relu())
        error = (acts @ self.leaves["W_dec"][dead] - residual).square().sum(1).mean()
        variance = (residual - residual.mean(0)).square().sum(1).mean()
        return min(len(dead) / k_aux, 1.0) * error / variance / 32

    def ms(self, acts: Tensor) -> Tensor:
        """Return 1 - mean MS over latents that fire twice, by pairs; the largest activation is treated as a constant."""
        if not self.ms_weight:
            return torch.zeros(())
        scaled = acts / acts.max(0).values.detach().clamp_min(1e-12)
        p = self.batch.joint
        assert p is not None
        scores = []
        for latent in scaled.T:
            if int((latent > 0).sum()) < 2:
                continue
            pairs = latent[:, None] * latent[None]
            upper = torch.ones_like(pairs).triu(1)
            scores.append((pairs * (p @ p.T) * upper).sum() / (pairs * upper).sum())
        return self.ms_weight * (1 - torch.stack(scores).mean())


def topk_acts(pre: Tensor) -> Tensor:
    top = pre.relu().topk(K, dim=1)
    return torch.zeros_like(pre).scatter(1, top.indices, top.values)


def batch_topk_acts(pre: Tensor) -> Tensor:
    flat = pre.relu().flatten()
    keep = torch.zeros_like(flat).scatter_(0, flat.topk(K * len(pre)).indices, 1.0)
    return (flat * keep).view_as(pre)


def topk(o: Oracle, dead: Tensor) -> Tensor:
    acts = topk_acts(o.pre)
    return o.error(o.decode(acts)) + o.ms(acts) + o.aux(o.decode(acts), dead)


def batch_topk(o: Oracle, dead: Tensor) -> Tensor:
    acts = batch_topk_acts(o.pre)
    return o.error(o.decode(acts)) + o.ms(acts) + o.aux(o.decode(acts), dead)


def matryoshka(o: Oracle, dead: Tensor) -> Tensor:
    acts = batch_topk_acts(o.pre)
    levels = [o.error(o.decode(acts[:, :n], o.leaves["W_dec"][:n])) for n in LEVELS]
    return torch.stack(levels).mean() + o.ms(acts) + o.aux(o.decode(acts), dead)


def relu(o: Oracle, dead: Tensor) -> Tensor:
    acts = o.pre.relu()
    return o.error(o.decode(acts)) + 0.3 * acts.sum(1).mean() + o.ms(acts)


def gated(o: Oracle, dead: Tensor) -> Tensor:
    is_open = (o.pre > 0).double()
    mag = (o.leaves["r_mag"].exp() * (o.inputs @ o.leaves["W_enc"].T) + o.leaves["b_mag"]).relu()
    acts, gates = mag * is_open, o.pre.relu()
    frozen = o.decode(gates, o.leaves["W_dec"].detach()) - o.leaves["b_dec"] + o.leaves["b_dec"].detach()
    if "b_pre" not in FIXED:
        frozen = gates @ o.leaves["W_dec"].detach() + o.leaves["b_dec"].detach()
    return o.error(o.decode(acts)) + 0.3 * gates.sum(1).mean() + o.error(frozen) + o.ms(acts)


FIXED: dict[str, Tensor] = {}


class Jump(torch.autograd.Function):
    """Return pre where pre > theta, with the pseudo-derivative of the paper, and likewise for the step function."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, width: float, is_step: bool) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.width, ctx.is_step = width, is_step
        fires = (pre > theta).to(pre.dtype)
        return fires if is_step else pre * fires

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        pre, theta = ctx.saved_tensors
        kernel = ((pre - theta).abs() < ctx.width / 2).to(pre.dtype) / ctx.width
        of_pre = torch.zeros_like(pre) if ctx.is_step else grad * (pre > theta)
        of_theta = -(1.0 if ctx.is_step else theta) * kernel * grad
        return of_pre, of_theta.sum(0), None, None


def jumprelu(o: Oracle, dead: Tensor, tanh: bool = False) -> Tensor:
    theta, width = o.leaves["log_threshold"].exp(), 0.5 * o.guides.mean_act
    acts = Jump.apply(o.pre, theta, width, False)
    assert isinstance(acts, Tensor)
    penalty = torch.tanh(4 * acts / o.guides.mean_act) if tanh else Jump.apply(o.pre, theta, width, True)
    assert isinstance(penalty, Tensor)
    return o.error(o.decode(acts)) + 0.3 * penalty.sum(1).mean() + o.ms(acts)


CASES: dict[str, tuple[dict[str, Any], Callable[[Oracle, Tensor], Tensor]]] = {
    "topk": ({"kind": "topk"}, topk),
    "batch_topk": ({"kind": "batch_topk"}, batch_topk),
    "matryoshka": ({"kind": "matryoshka", "prefixes": [1 / 8, 1 / 4, 1 / 2, 1]}, matryoshka),
    "relu": ({"kind": "relu", "l1": 0.3}, relu),
    "gated": ({"kind": "gated", "l1": 0.3}, gated),
    "jumprelu": ({"kind": "jumprelu", "weight": 0.3, "bandwidth": 0.5}, jumprelu),
    "jumprelu tanh": ({"kind": "jumprelu", "weight": 0.3, "bandwidth": 0.5, "sparsity": "tanh"}, lambda o, d: jumprelu(o, d, tanh=True)),
}


@pytest.mark.parametrize("dense_share", [1.0, 0.0], ids=["sparse", "dense"])
@pytest.mark.parametrize(
    ("name", "acts_of"), [("topk", topk_acts), ("batch_topk", batch_topk_acts), ("matryoshka", batch_topk_acts), ("relu", torch.relu)]
)
def test_a_step_returns_the_reconstruction_by_the_whole_dictionary(
    name: str, acts_of: Callable[[Tensor], Tensor], dense_share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "DENSE_SHARE", dense_share)
    variant, weights, batch, guides = make(CASES[name][0], 0.0), make_weights(), make_batch(), Guides(floor=0.3)
    variant.begin(weights, batch.x - weights.b_dec, guides)
    acts = acts_of((batch.x - weights.b_dec) @ weights.W_enc.T + weights.b_enc)
    step = variant.step(weights, batch, guides, torch.arange(N_DEAD))
    torch.testing.assert_close(step.x_hat, acts @ weights.W_dec + weights.b_dec, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dense_share", [1.0, 0.0], ids=["sparse", "dense"])
@pytest.mark.parametrize("ms_weight", [0.0, 0.7], ids=["", "ms"])
@pytest.mark.parametrize("transcoder", [False, True], ids=["", "transcoder"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_the_definition(
    name: str, transcoder: bool, ms_weight: float, dense_share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "DENSE_SHARE", dense_share)
    kind, loss_of = CASES[name]
    variant, weights, batch = make(kind, ms_weight), make_weights(transcoder), make_batch(transcoder)
    guides = Guides(floor=0.3)
    variant.begin(weights, batch.x - weights.fixed.get("b_pre", weights.b_dec), guides)
    if "r_mag" in weights.extra:
        weights.extra |= {"r_mag": 0.2 * seeded(8, D_SAE), "b_mag": 0.2 * seeded(9, D_SAE)}
    if "log_threshold" in weights.extra:
        weights.extra["log_threshold"] += 0.2 * seeded(8, D_SAE)
    dead = torch.arange(N_DEAD)
    oracle = Oracle(weights, batch, Guides(mean_act=guides.mean_act), ms_weight)
    loss = loss_of(oracle, dead)
    loss.backward()
    step = variant.step(weights, batch, guides, dead)
    assert float(step.loss) == pytest.approx(float(loss.detach()), rel=1e-12)
    for key, leaf in oracle.leaves.items():
        torch.testing.assert_close(weights.grads()[key], leaf.grad, rtol=1e-10, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


def test_archetypal_gradients_equal_those_of_the_definition() -> None:
    variant, weights, batch = make({"kind": "archetypal", "points": 7, "relaxation": 0.3}), make_weights(), make_batch()
    weights.derives_W_dec = True
    x = seeded(10, 200, D_MODEL)
    for tensor in (weights.W_enc, weights.b_enc, weights.W_dec, weights.b_dec):
        tensor.data = tensor.data.float()
    variant.begin(weights, x.float(), Guides())
    extra = {name: tensor.double() for name, tensor in weights.extra.items()}
    extra["shift"] = 0.05 * seeded(11, D_SAE, D_MODEL)
    plain = [tensor.double() for tensor in (weights.W_enc, weights.b_enc, weights.W_dec, weights.b_dec)]
    weights = Weights(*plain, extra=extra, fixed={"centres": weights.fixed["centres"].double()}, derives_W_dec=True)
    variant.constrain(weights)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.trained().items()}
    W_dec = normalize(leaves["mix"] @ weights.fixed["centres"] + leaves["shift"], dim=1)
    acts = batch_topk_acts((batch.x - leaves["b_dec"]) @ leaves["W_enc"].T + leaves["b_enc"])
    loss = (acts @ W_dec + leaves["b_dec"] - batch.x).square().sum(1).mean()
    loss.backward()
    step = variant.step(weights, batch, Guides(floor=0.2), torch.arange(0))
    assert float(step.loss) == pytest.approx(float(loss.detach()), rel=1e-10)
    for key, leaf in leaves.items():
        torch.testing.assert_close(weights.grads()[key], leaf.grad, rtol=1e-8, atol=1e-10)
    assert bool((extra["mix"] >= 0).all()) and torch.allclose(extra["mix"].sum(1), torch.ones(D_SAE, dtype=torch.float64))


@pytest.mark.parametrize(("points", "most"), [(None, 0.0), (25, 0.5)], ids=["a centre a latent", "fewer centres"])
def test_archetypal_directions_initially_share_at_most_half_of_a_centre(points: int | None, most: float) -> None:
    variant, weights = make({"kind": "archetypal", "points": points}), make_weights()
    for tensor in (weights.W_enc, weights.b_enc, weights.W_dec, weights.b_dec):
        tensor.data = tensor.data.float()
    variant.begin(weights, seeded(10, 200, D_MODEL).float(), Guides())
    mix = weights.extra["mix"]
    shared = torch.minimum(mix[:, None], mix).sum(2).fill_diagonal_(0)
    assert float(shared.max()) == most
    torch.testing.assert_close(mix.sum(1), torch.ones(D_SAE))


def test_a_controlled_penalty_settles_at_k_although_latents_react_late() -> None:
    variant, guides, firings, seen = make({"kind": "relu"}), Guides(penalty=1e-3), 10.0 * K, []
    for _ in range(150):
        variant._steer(guides, round(firings * 1000), 1000)  # pyright: ignore
        firings *= (guides.penalty / 0.1) ** -0.2  # fewer and fewer fire while the penalty is above 0.1
        seen.append(firings)
    assert seen[-20:] == pytest.approx([K] * 20, rel=0.1), "without damping it swings around k for ever"


def test_random_prefixes_differ_from_step_to_step_and_end_with_all() -> None:
    variant = make({"kind": "matryoshka", "random": True})
    seen = {variant._levels_of(Guides(step=step)).bounds for step in range(20)}  # pyright: ignore
    assert len(seen) > 10
    assert all(bounds[-1] == D_SAE and list(bounds) == sorted(set(bounds)) and len(bounds) == 5 for bounds in seen)
    assert variant._levels_of(Guides(step=3)).bounds == variant._levels_of(Guides(step=3)).bounds  # pyright: ignore


@pytest.mark.parametrize("bounds", [(D_SAE,), LEVELS], ids=["one level", "levels"])
def test_sparse_products_equal_the_dense_ones(bounds: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    levels, values = Levels(bounds), seeded(1, N_TOKENS, D_SAE).relu()
    rows, latents = values.nonzero(as_tuple=True)
    sparse, dense = Sparse(N_TOKENS, levels, rows, latents, values[rows, latents]), Dense(levels, values)
    W, table, inputs = seeded(2, D_SAE, D_MODEL), seeded(3, N_TOKENS, len(bounds), D_MODEL), seeded(4, N_TOKENS, 1, D_MODEL)
    torch.testing.assert_close(sparse.decode(sparse.values, W), dense.decode(values, W))
    for one in (table, inputs):
        torch.testing.assert_close(sparse.product(one, W), dense.product(one, W)[rows, latents])
        expected = torch.empty(D_SAE, D_MODEL, dtype=torch.float64)
        dense.weighted_sums(values, one, expected)
        for has_mkl in {entries.HAS_MKL, False}:
            monkeypatch.setattr(entries, "HAS_MKL", has_mkl)
            found = torch.full_like(expected, math.nan)  # what is in it before does not matter
            sparse.weighted_sums(sparse.values, one, found)
            torch.testing.assert_close(found, expected)
    torch.testing.assert_close(sparse.sum_by_latent(sparse.values), values.sum(0))
    torch.testing.assert_close(sparse.max_by_latent(sparse.values), values.amax(0))
    of_sparse, of_dense = (
        torch.bincount(latents, minlength=D_SAE) for latents in (sparse.firing_latents(sparse.values), dense.firing_latents(values))
    )
    assert of_sparse.tolist() == of_dense.tolist() == (values > 0).sum(0).tolist()
    assert math.isclose(float(sparse.at(W[:, 0]).sum()), float(W[latents, 0].sum()), rel_tol=1e-12)


def aux_gradients(n_dead: int, dtype: torch.dtype, arithmetic: torch.dtype) -> dict[str, Tensor]:
    weights, batch, x_hat = make_weights(), make_batch(), seeded(12, N_TOKENS, D_MODEL) / 4
    for tensor in (weights.W_enc, weights.b_enc, weights.W_dec, weights.b_dec):
        tensor.data = tensor.data.to(dtype)
    x = batch.x.to(dtype)
    loss = add_aux(weights, Batch(x, x), x - weights.b_dec, x_hat.to(dtype), torch.arange(n_dead), 1.0, arithmetic)
    return {"loss": loss, **weights.grads()}


@pytest.mark.parametrize("n_dead", [3, D_MODEL // 2, 20], ids=["fewer than fire", "as many", "more"])
def test_the_auxiliary_loss_equals_its_definition_for_any_number_of_dead_latents(n_dead: int) -> None:
    weights, batch, x_hat, k = make_weights(), make_batch(), seeded(12, N_TOKENS, D_MODEL) / 4, D_MODEL // 2
    leaves = {name: tensor[:n_dead].clone().requires_grad_() for name, tensor in weights.trained().items() if name != "b_dec"}
    pre_acts = (batch.x - weights.b_dec) @ leaves["W_enc"].T + leaves["b_enc"]
    top = pre_acts.topk(min(k, n_dead), dim=1)
    acts = torch.zeros_like(pre_acts).scatter(1, top.indices, top.values.relu())
    residual = batch.x - x_hat
    variance = (residual - residual.mean(0)).square().sum(1).mean()
    loss = min(n_dead / k, 1) * (acts @ leaves["W_dec"] - residual).square().sum(1).mean() / variance
    loss.backward()
    found = aux_gradients(n_dead, torch.float64, torch.float64)
    assert float(found["loss"]) == pytest.approx(float(loss.detach()), rel=1e-12)
    for name, leaf in leaves.items():
        torch.testing.assert_close(found[name][:n_dead], leaf.grad, rtol=1e-10, atol=1e-12)
        assert not found[name][n_dead:].any()


@pytest.mark.parametrize("n_dead", [3, 20])
def test_the_auxiliary_gradient_in_bfloat16_has_the_same_direction(n_dead: int) -> None:
    exact, rounded = (aux_gradients(n_dead, torch.float32, arithmetic) for arithmetic in (torch.float32, torch.bfloat16))
    for name, gradient in exact.items():
        error = float((rounded[name] - gradient).norm() / gradient.norm())
        assert error < 0.05, name
    assert any(not torch.equal(rounded[name], gradient) for name, gradient in exact.items())
