"""BatchTopK: the number of firings in a batch is fixed, so no sparsity penalty is needed."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ommatid.config import variants
from ommatid.sae.entries import Entries, Levels
from ommatid.sae.select import FLOOR_SHARE, Scorer, select_batch
from ommatid.sae.step import Batch, Step, add_aux, add_monosemanticity, centre, reconstruct, set_gradients
from ommatid.sae.variants.base import Guides, Settings, Variant, make_scorer
from ommatid.sae.weights import Weights


class BatchTopK(Variant):
    """BatchTopK SAE (arXiv 2412.06410): acts = pre_acts where they are among the k · batch largest positive ones of the batch, else 0.

    loss = mean ‖x̂ − x‖² + AuxK. At inference, a latent fires above a threshold: the moving average, over steps, of the smallest activation
    that fired.
    """

    def begin(self, weights: Weights, x_nd: Float[Tensor, "tokens d_model"], guides: Guides) -> None:
        """Do nothing: the variant has no tensors of its own."""

    def step(self, weights: Weights, batch: Batch, guides: Guides, dead: Int[Tensor, " n_dead"]) -> Step:
        """See `Variant`."""
        inputs, settings = centre(weights, batch), self._settings
        scorer = make_scorer(settings, weights, inputs, self._levels_of(guides))
        entries, threshold = self._select(scorer, guides)
        acts = entries.values
        reconstruction = reconstruct(entries, acts, weights, batch)
        grad_acts = entries.product(reconstruction.table, weights.W_dec)
        loss = reconstruction.loss
        if settings.ms_weight:
            loss = loss + add_monosemanticity(entries, acts, batch, settings.ms_weight, grad_acts)
        set_gradients(weights, entries, reconstruction, acts, grad_acts.mul_(acts > 0), inputs)
        x_hat = reconstruction.take_x_hat(batch.target)
        if settings.aux_coefficient and len(dead):
            loss = loss + add_aux(weights, batch, inputs, x_hat, dead, settings.aux_coefficient, scorer.dtype)
        return Step(loss, x_hat, int((acts > 0).sum()), entries.firing_latents(acts), threshold)

    def thresholds(self, weights: Weights, average: float) -> dict[str, Tensor]:
        """See `Variant`."""
        return {"threshold": torch.tensor(average)}

    def _levels_of(self, guides: Guides) -> Levels:
        return self._levels

    def _select(self, scorer: Scorer, guides: Guides) -> tuple[Entries, float]:
        entries, threshold = select_batch(scorer, self._settings.k, FLOOR_SHARE * guides.floor)
        guides.floor = threshold
        return entries, threshold


def make(params: variants.BatchTopK, settings: Settings) -> BatchTopK:
    """Make the variant from its parameters."""
    return BatchTopK(settings)
