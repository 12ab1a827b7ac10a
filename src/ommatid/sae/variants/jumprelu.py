"""JumpReLU: each latent learns the threshold above which it fires, by a straight-through estimator."""

import math
from typing import Literal, assert_never

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ommatid.config import variants
from ommatid.sae.select import select_above
from ommatid.sae.step import Batch, Step, add_monosemanticity, centre, reconstruct, set_gradients
from ommatid.sae.variants.base import Guides, Settings, Steered, average_act, make_scorer, quantile
from ommatid.sae.weights import Weights, grad_of

TANH_SLOPE = 4.0
"""Slope of the tanh penalty (Conerly et al. 2025) at 0, for activations in units of their mean."""
REACH = 10.0
"""Distance that log-thresholds can move over a run. Falling from 4 k firings per token to k takes 1 or 2; the rest allows for detours."""
FIRST_FIRINGS = 4
"""Firings per token, as a multiple of k, at the initial thresholds."""


class JumpReLU(Steered):
    """JumpReLU SAE (arXiv 2407.14435).

    acts = pre_acts where pre_acts > θ, else 0, with θ = exp(log_threshold) of each latent;  loss = mean ‖x̂ − x‖² + λ mean S.
    S is the number of firing latents, or Σ tanh(4 acts / mean act). The gradient of θ is the paper's pseudo-derivative (equations 11
    and 12), with the rectangle kernel K of width ε, which is the bandwidth times the mean activation:
    d acts / dθ = −(θ/ε) K((pre − θ)/ε),  d 1[pre > θ] / dθ = −(1/ε) K((pre − θ)/ε).
    λ is fixed, or steered so that k latents fire per token.
    """

    def __init__(self, settings: Settings, weight: float | None, bandwidth: float, sparsity: Literal["l0", "tanh"]) -> None:
        super().__init__(settings, weight)
        self._bandwidth = bandwidth
        self._sparsity: Literal["l0", "tanh"] = sparsity

    def begin(self, weights: Weights, x_nd: Float[Tensor, "tokens d_model"], guides: Guides) -> None:
        """Initialise thresholds so that `FIRST_FIRINGS` times k latents fire per token."""
        super().begin(weights, x_nd, guides)
        pre_acts = torch.addmm(weights.b_enc, x_nd[:2048], weights.W_enc.T)
        first = max(quantile(pre_acts, FIRST_FIRINGS * self._settings.k), 1e-3)
        guides.mean_act = float(pre_acts[pre_acts > first].mean()) if bool((pre_acts > first).any()) else first
        weights.extra["log_threshold"] = torch.full_like(weights.b_enc, math.log(first))

    def rates(self, lr: float) -> dict[str, float]:
        """Return a rate at which log-thresholds can move by `REACH` over the run, whatever `lr` is: in Adam the rate bounds each step."""
        return {"log_threshold": max(1.0, REACH / (self._settings.n_steps * lr))}

    @property
    def most(self) -> float:
        """Upper bound on the weight of a steered penalty: at this weight, k firings cost as much as reconstructing nothing."""
        return 1 / self._settings.k

    def step(self, weights: Weights, batch: Batch, guides: Guides, dead: Int[Tensor, " n_dead"]) -> Step:
        """See `Variant`."""
        inputs, settings = centre(weights, batch), self._settings
        theta, width = weights.extra["log_threshold"].exp(), self._bandwidth * guides.mean_act
        entries = select_above(make_scorer(settings, weights, inputs, self._levels), theta - width / 2)
        at_theta = entries.at(theta)
        fires = entries.values > at_theta
        acts = entries.values * fires
        reconstruction = reconstruct(entries, acts, weights, batch)
        grad_acts = entries.product(reconstruction.table, weights.W_dec)
        loss = reconstruction.loss
        if settings.ms_weight:
            loss = loss + add_monosemanticity(entries, acts, batch, settings.ms_weight, grad_acts)
        weight = guides.penalty / batch.n_total
        penalty, of_acts, of_jump = self._penalty(acts, fires, guides.mean_act)
        grad_acts.add_(of_acts, alpha=weight)
        kernel = ((entries.values - at_theta).abs() < width / 2).to(acts.dtype) / width
        grad_theta = -kernel * (at_theta * grad_acts + weight * of_jump)
        set_gradients(weights, entries, reconstruction, acts, grad_acts.mul_(fires), inputs)
        grad_of(weights.extra["log_threshold"]).copy_(entries.sum_by_latent(grad_theta * at_theta))
        n_firings = int(fires.sum())
        average_act(guides, acts)
        self._steer(guides, n_firings, batch.n_total)
        return Step(loss + weight * penalty, reconstruction.take_x_hat(batch.target), n_firings, entries.firing_latents(acts), 0.0)

    def thresholds(self, weights: Weights, average: float) -> dict[str, Tensor]:
        """See `Variant`."""
        return {"threshold": weights.extra["log_threshold"].exp()}

    def _penalty(
        self, acts: Float[Tensor, "*entries"], fires: Tensor, mean_act: float
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "*entries"], float]:
        """Return S summed over the batch, its derivative with respect to activations, and the jump of S where an entry crosses θ."""
        match self._sparsity:
            case "l0":
                return fires.sum().to(acts.dtype), torch.zeros_like(acts), 1.0
            case "tanh":
                slope = TANH_SLOPE / mean_act
                squashed = torch.tanh(slope * acts)
                return squashed.sum(), slope * (1 - squashed.square()), 0.0
            case _:
                assert_never(self._sparsity)


def make(params: variants.JumpReLU, settings: Settings) -> JumpReLU:
    """Make the variant from its parameters."""
    return JumpReLU(settings, params.weight, params.bandwidth, params.sparsity)
