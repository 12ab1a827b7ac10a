"""TopK and BatchTopK: the number of firing latents is fixed, so nothing has to be penalised."""

import torch
from torch import Tensor

from ommatid.sae.entries import Entries, Levels
from ommatid.sae.model import Activation
from ommatid.sae.select import FLOOR_SHARE, Scorer, select_batch, select_token
from ommatid.sae.step import Batch, Step, add_aux, add_monosemanticity, centre, reconstruct, set_gradients
from ommatid.sae.variants.base import Guides, Variant, make_scorer
from ommatid.sae.weights import Weights


class BatchTopK(Variant):
    """acts = pre_acts where they are among the k · batch largest positive ones of the batch, else 0 (arXiv 2412.06410).

    loss = mean ‖x̂ − x‖² + AuxK. At inference the threshold is the average over steps of the smallest activation that fires.
    """

    def begin(self, weights: Weights, x_nd: Tensor, guides: Guides) -> None:
        """Nothing is trained besides."""

    def step(self, weights: Weights, batch: Batch, guides: Guides, dead: Tensor) -> Step:
        """See `Variant`."""
        inputs, settings = centre(weights, batch), self._settings
        scorer = make_scorer(settings, weights, inputs, self._levels_of(guides))
        entries, threshold = self._select(scorer, guides)
        acts = entries.values
        found = reconstruct(entries, acts, weights, batch)
        grad_acts = entries.product(found.table, weights.W_dec)
        loss = found.loss
        if settings.ms_weight:
            loss = loss + add_monosemanticity(entries, acts, batch, settings.ms_weight, grad_acts)
        set_gradients(weights, entries, found, acts, grad_acts.mul_(acts > 0), inputs)
        x_hat = found.take_x_hat(batch.target)
        if settings.aux_coefficient and len(dead):
            loss = loss + add_aux(weights, batch, inputs, x_hat, dead, settings.aux_coefficient, scorer.dtype)
        return Step(loss, x_hat, int((acts > 0).sum()), entries.fired(acts), threshold)

    def thresholds(self, weights: Weights, average: float) -> dict[str, Tensor]:
        """See `Variant`."""
        return {"threshold": torch.tensor(average)}

    def _levels_of(self, guides: Guides) -> Levels:
        return self._levels

    def _select(self, scorer: Scorer, guides: Guides) -> tuple[Entries, float]:
        entries, threshold = select_batch(scorer, self._settings.k, FLOOR_SHARE * guides.floor)
        guides.floor = threshold
        return entries, threshold


class TopK(BatchTopK):
    """acts = pre_acts where they are among the k largest positive ones of their token, else 0 (arXiv 2406.04093)."""

    activation: Activation = "topk"

    def _select(self, scorer: Scorer, guides: Guides) -> tuple[Entries, float]:
        entries, guides.floor = select_token(scorer, self._settings.k, FLOOR_SHARE * guides.floor)
        return entries, 0.0

    def thresholds(self, weights: Weights, average: float) -> dict[str, Tensor]:
        """None: it is the k largest that fire."""
        return {"threshold": torch.tensor(0.0)}
