"""Gated: whether a latent fires and how strongly are learned separately, so that the sparsity penalty does not shrink activations."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ommatid.config import variants
from ommatid.sae.entries import Entries
from ommatid.sae.model import Activation
from ommatid.sae.select import select_above
from ommatid.sae.step import Batch, Step, add_monosemanticity, centre, reconstruct, set_gradients
from ommatid.sae.variants.base import Guides, Settings, Steered, make_scorer
from ommatid.sae.weights import Weights, grad_of


class Gated(Steered):
    """Gated SAE (arXiv 2404.16014, equations 6 to 8).

    gate π = W x + b_gate;  acts = relu(exp(r) · W x + b_mag) where π > 0, else 0.
    loss = mean ‖x̂(acts) − x‖² + λ mean Σ relu(π) + mean ‖x̂_frozen(relu(π)) − x‖², where the decoder of the last term is held constant.
    λ is fixed, or steered so that k latents fire per token.
    """

    activation: Activation = "gated"

    def begin(self, weights: Weights, x_nd: Float[Tensor, "tokens d_model"], guides: Guides) -> None:
        """Initialise magnitudes so that they equal the gates' pre-activations."""
        super().begin(weights, x_nd, guides)
        weights.extra |= {"r_mag": torch.zeros_like(weights.b_enc), "b_mag": weights.b_enc.clone()}

    def step(self, weights: Weights, batch: Batch, guides: Guides, dead: Int[Tensor, " n_dead"]) -> Step:
        """See `Variant`."""
        inputs, settings = centre(weights, batch), self._settings
        scorer = make_scorer(settings, weights, inputs, self._levels)
        entries = select_above(scorer, torch.zeros((), dtype=inputs.dtype, device=inputs.device))
        gates, scale = entries.values.relu(), entries.at(weights.extra["r_mag"].exp())
        is_open, bare = entries.values > 0, entries.values - entries.at(weights.b_enc)
        acts = (scale * bare + entries.at(weights.extra["b_mag"])).relu_().mul_(is_open)
        reconstruction, frozen = (reconstruct(entries, values, weights, batch) for values in (acts, gates))
        weight = guides.penalty / batch.n_total
        grad_mag = entries.product(reconstruction.table, weights.W_dec)
        loss = reconstruction.loss + frozen.loss + weight * gates.sum()
        if settings.ms_weight:
            loss = loss + add_monosemanticity(entries, acts, batch, settings.ms_weight, grad_mag)
        grad_mag.mul_(acts > 0)
        grad_gate = entries.product(frozen.table, weights.W_dec).add_(weight).mul_(is_open)
        self._set_gradients(weights, entries, grad_mag, scale * bare)
        set_gradients(weights, entries, reconstruction, acts, grad_gate + grad_mag * scale, inputs, grad_gate)
        n_firings = int((acts > 0).sum())
        self._steer(guides, n_firings, batch.n_total)
        return Step(loss, reconstruction.take_x_hat(batch.target), n_firings, entries.firing_latents(acts), 0.0)

    def thresholds(self, weights: Weights, average: float) -> dict[str, Tensor]:
        """Return the scale and the shift of the magnitude as a linear function of the gate π: exp(r) (π − b_gate) + b_mag."""
        scale = weights.extra["r_mag"].exp()
        shift = weights.extra["b_mag"] - scale * weights.b_enc
        return {"threshold": torch.tensor(0.0), "gate_scale": scale, "gate_shift": shift}

    def _set_gradients(
        self, weights: Weights, entries: Entries, grad_mag: Float[Tensor, "*entries"], scaled: Float[Tensor, "*entries"]
    ) -> None:
        grad_of(weights.extra["b_mag"]).copy_(entries.sum_by_latent(grad_mag))
        grad_of(weights.extra["r_mag"]).copy_(entries.sum_by_latent(grad_mag * scaled))


def make(params: variants.Gated, settings: Settings) -> Gated:
    """Make the variant from its parameters."""
    return Gated(settings, params.l1)
