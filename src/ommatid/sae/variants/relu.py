"""ReLU with an L1 penalty and resampling of dead latents, as in the SAEs of Bricken et al. 2023."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from ommatid.config import variants
from ommatid.sae import distributed
from ommatid.sae.select import select_above
from ommatid.sae.step import Batch, Step, add_monosemanticity, centre, reconstruct, set_gradients
from ommatid.sae.variants.base import Guides, Settings, Steered, make_scorer
from ommatid.sae.weights import Weights, grad_of

RESAMPLE_AT = (1 / 8, 1 / 4, 3 / 8, 1 / 2)
"""Shares of the run after which dead latents are resampled (Bricken et al. 2023: steps 25,000 to 100,000 of 200,000)."""
RESAMPLED_NORM = 0.2
"""Norm of a resampled encoder row, as a share of the mean norm of the other rows."""


class ReLU(Steered):
    """ReLU SAE: acts = relu(pre_acts);  loss = mean ‖x̂ − x‖² + λ mean Σ acts, with directions of unit norm.

    λ is fixed, or steered so that k latents fire per token.
    """

    def step(self, weights: Weights, batch: Batch, guides: Guides, dead: Int[Tensor, " n_dead"]) -> Step:
        """See `Variant`."""
        inputs, settings = centre(weights, batch), self._settings
        scorer = make_scorer(settings, weights, inputs, self._levels)
        entries = select_above(scorer, torch.zeros((), dtype=inputs.dtype, device=inputs.device))
        acts = entries.values.relu()
        reconstruction = reconstruct(entries, acts, weights, batch)
        weight = guides.penalty / batch.n_total
        grad_acts = entries.product(reconstruction.table, weights.W_dec).add_(weight)
        loss = reconstruction.loss + weight * acts.sum()
        if settings.ms_weight:
            loss = loss + add_monosemanticity(entries, acts, batch, settings.ms_weight, grad_acts)
        set_gradients(weights, entries, reconstruction, acts, grad_acts.mul_(acts > 0), inputs)
        n_firings = int((acts > 0).sum())
        self._steer(guides, n_firings, batch.n_total)
        return Step(loss, reconstruction.take_x_hat(batch.target), n_firings, entries.firing_latents(acts), 0.0)

    def thresholds(self, weights: Weights, average: float) -> dict[str, Tensor]:
        """See `Variant`."""
        return {"threshold": torch.tensor(0.0)}

    def revive(self, weights: Weights, batch: Batch, step: Step, guides: Guides, idle: Int[Tensor, " d_sae"]) -> Int[Tensor, " revived"]:
        """Resample dead latents if a share of the run in `RESAMPLE_AT` is complete."""
        if guides.step not in {round(share * self._settings.n_steps) for share in RESAMPLE_AT}:
            return idle.new_zeros(0)
        silent = (idle >= self._settings.dead_after).nonzero()[:, 0]
        if len(silent):
            _resample(weights, batch, step.x_hat, silent, self._settings.seed + guides.step)
        return silent


def _resample(weights: Weights, batch: Batch, x_hat: Float[Tensor, "batch d_out"], dead: Int[Tensor, " n_dead"], seed: int) -> None:
    """Give dead latents the directions of poorly reconstructed tokens, drawn with probability proportional to the square of their loss.

    All ranks use the tokens that rank 0 draws from its share of the batch.
    """
    errors = (batch.target - x_hat).square().sum(1)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.multinomial(errors.square().cpu().double(), len(dead), replacement=True, generator=generator).to(dead.device)
    alive = torch.ones(weights.d_sae, dtype=torch.bool, device=dead.device)
    alive[dead] = False
    length = RESAMPLED_NORM * float(weights.W_enc[alive].norm(dim=1).mean()) if alive.any() else RESAMPLED_NORM
    weights.W_dec[dead] = distributed.broadcast(normalize((batch.target - weights.b_dec)[tokens], dim=1))
    weights.W_enc[dead] = distributed.broadcast(length * normalize(centre(weights, batch)[tokens], dim=1))
    weights.b_enc[dead] = 0.0
    for tensor in (weights.W_dec, weights.W_enc, weights.b_enc):
        grad_of(tensor)[dead] = 0.0


def make(params: variants.ReLU, settings: Settings) -> ReLU:
    """Make the variant from its parameters."""
    return ReLU(settings, params.l1)
