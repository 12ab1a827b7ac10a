"""One step of BatchTopK training: selection, reconstruction and gradients over the active entries only.

BatchTopK (arXiv 2412.06410): of a batch's pre-activations the k·batch largest positive ones fire.
AuxK (arXiv 2406.04093, appendix A.2): dead latents reconstruct what the living leave over.
Only the encoder's forward product is dense; decoder and gradients cost batch·k·d_model each. `tests/sae/` holds the dense oracle.

Suffixes: b tokens of the batch, d d_model, s latents, n active entries. W_enc is kept transposed (d_sae, d_model), so that a
latent's weights are contiguous in both matrices.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclass
class Weights:
    """The trained tensors, of scaled activations."""

    W_enc: Tensor
    """(d_sae, d_model): transposed."""
    b_enc: Tensor
    """(d_sae,)"""
    W_dec: Tensor
    """(d_sae, d_model)"""
    b_dec: Tensor
    """(d_model,)"""

    def all(self) -> list[Tensor]:
        """In the order the optimiser holds them."""
        return [self.W_enc, self.b_enc, self.W_dec, self.b_dec]


@dataclass(frozen=True)
class Active:
    """The entries that fire, ordered by token."""

    rows: Tensor
    """Token of each entry, (n,), ascending."""
    latents: Tensor
    """Latent of each entry, (n,)."""
    acts: Tensor
    """Its activation, (n,), > 0."""


@dataclass(frozen=True)
class Step:
    """What one step computed; the gradients are in `.grad` of the weights."""

    active: Active
    loss: float
    """Mean squared reconstruction error a token plus the weighted AuxK loss."""
    x_hat: Tensor
    """Reconstruction, (batch, d_model)."""


def compute_step(weights: Weights, x_bd: Tensor, k: int, floor: float, dead_s: Tensor, aux_coefficient: float) -> Step:
    """Loss and gradients of one batch of scaled activations x (batch, d_model).

    Args:
        weights: Their `.grad` is set.
        x_bd: Scaled activations.
        k: Mean latents that fire a token.
        floor: A guess below which nothing fires (the last step's threshold, lowered); only speed depends on it.
        dead_s: Which latents are dead, (d_sae,) bool.
        aux_coefficient: Weight of AuxK.
    """
    n_tokens = x_bd.shape[0]
    centred = x_bd - weights.b_dec
    pre_acts = torch.addmm(weights.b_enc, centred, weights.W_enc.T)
    active = select(pre_acts, k * n_tokens, floor)
    x_hat = _decode(active, n_tokens, weights)
    error = x_hat - x_bd
    loss = float(error.square().sum()) / n_tokens
    _backward(weights, active, centred, error * (2 / n_tokens))
    if aux_coefficient > 0 and bool(dead_s.any()):
        loss += aux_coefficient * _add_aux(weights, pre_acts, centred, -error, dead_s.nonzero()[:, 0], aux_coefficient)
    return Step(active, loss, x_hat)


def select(pre_acts_bs: Tensor, n: int, floor: float) -> Active:
    """The n largest positive entries, fewer if there are fewer. `floor` is a first guess at the smallest of them."""
    flat = pre_acts_bs.flatten()
    candidates = (flat > max(floor, 0.0)).nonzero()[:, 0]
    if len(candidates) < n and floor > 0:
        candidates = (flat > 0).nonzero()[:, 0]
    acts = flat[candidates]
    if len(candidates) > n:
        chosen = acts.topk(n, sorted=False).indices.sort().values
        candidates, acts = candidates[chosen], acts[chosen]
    d_sae = pre_acts_bs.shape[1]
    return Active(candidates // d_sae, candidates % d_sae, acts)


def _decode(active: Active, n_tokens: int, weights: Weights) -> Tensor:
    return _sum_rows(weights.W_dec, active.latents, active.acts, active.rows, n_tokens).add_(weights.b_dec)


def _sum_rows(table: Tensor, index: Tensor, weight: Tensor, group: Tensor, n_groups: int) -> Tensor:
    """For each group (ascending), the weighted sum of table rows: (n_groups, width)."""
    starts = torch.searchsorted(group, torch.arange(n_groups, device=group.device))
    return embedding_bag(index, table, starts, mode="sum", per_sample_weights=weight)


def _backward(weights: Weights, active: Active, centred: Tensor, grad_x_hat: Tensor) -> None:
    d_sae = weights.b_enc.shape[0]
    grad_acts = _sampled_product(grad_x_hat, weights.W_dec, active)
    by_latent = active.latents.argsort(stable=True)
    latents, rows = active.latents[by_latent], active.rows[by_latent]
    weights.W_dec.grad = _sum_rows(grad_x_hat, rows, active.acts[by_latent], latents, d_sae)
    weights.W_enc.grad = _sum_rows(centred, rows, grad_acts[by_latent], latents, d_sae)
    weights.b_enc.grad = torch.bincount(active.latents, grad_acts, minlength=d_sae).to(grad_acts.dtype)
    weights.b_dec.grad = grad_x_hat.sum(0) - weights.b_enc.grad @ weights.W_enc


def _sampled_product(grad_bd: Tensor, directions_sd: Tensor, active: Active, chunk: int = 2048) -> Tensor:
    """grad·direction at the active entries only, (n,)."""
    pieces = zip(active.rows.split(chunk), active.latents.split(chunk), strict=True)
    return torch.cat([torch.linalg.vecdot(grad_bd[rows], directions_sd[latents]) for rows, latents in pieces])


def _add_aux(weights: Weights, pre_acts: Tensor, centred: Tensor, residual: Tensor, dead: Tensor, coefficient: float) -> float:
    """Add AuxK's gradients; gives the loss without its coefficient.

    The residual is a constant here, b_dec takes no part in the reconstruction, the loss is divided by the residual's
    variance and scaled by min(n_dead / k_aux, 1).
    """
    n_tokens, d_model = centred.shape
    k_aux = d_model // 2
    top = pre_acts[:, dead].topk(min(k_aux, len(dead)), dim=1)
    acts = torch.zeros(n_tokens, len(dead), dtype=pre_acts.dtype, device=pre_acts.device).scatter_(1, top.indices, top.values.relu())
    W_dec = weights.W_dec[dead]
    error = acts @ W_dec - residual
    variance = float((residual - residual.mean(0)).square().sum()) / n_tokens
    scale = min(len(dead) / k_aux, 1.0) / max(variance, 1e-12)
    grad_x_hat = error * (2 * coefficient * scale / n_tokens)
    grad_acts = (grad_x_hat @ W_dec.T) * (acts > 0)
    _grad(weights.W_dec).index_add_(0, dead, acts.T @ grad_x_hat)
    _grad(weights.W_enc).index_add_(0, dead, grad_acts.T @ centred)
    grad_b_enc = grad_acts.sum(0)
    _grad(weights.b_enc).index_add_(0, dead, grad_b_enc)
    _grad(weights.b_dec).sub_(grad_b_enc @ weights.W_enc[dead])
    return scale * float(error.square().sum()) / n_tokens


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad
