"""Archetypal (RA-SAE): directions are nearly convex combinations of data centres, so that runs with different seeds agree."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ommatid.config import variants
from ommatid.sae.init import fit_scale
from ommatid.sae.kmeans import find_centres
from ommatid.sae.step import Batch, Step
from ommatid.sae.variants.base import Guides, Settings
from ommatid.sae.variants.batch_topk import BatchTopK
from ommatid.sae.weights import Weights, grad_of

MOST_CENTRES = 2048
"""Default limit on the number of centres. The product A C costs d_sae · centres · d_model per step: more than the encoder's product if
there are more centres than tokens in a batch."""


class Archetypal(BatchTopK):
    """BatchTopK with W_dec = normalise(A C + Λ) (arXiv 2502.12892).

    Rows of A are non-negative and sum to 1, C are centres of the centred data, and each row of Λ is at most δ times as long as the same
    row of A C. This is D = W C + Λ of the paper (equation 6), except that δ is relative and directions have unit norm.
    """

    derives_W_dec = True

    def __init__(self, settings: Settings, n_centres: int | None, relaxation: float) -> None:
        super().__init__(settings)
        self._n_centres = n_centres or min(MOST_CENTRES, settings.d_sae)
        self._relaxation = relaxation

    def begin(self, weights: Weights, x_nd: Float[Tensor, "tokens d_model"], guides: Guides) -> None:
        """Start each direction at a different centre; start any further directions halfway between a centre and a random second one.

        Directions that start close to the same centre would compete for the same tokens from the first step, and many would die.
        """
        centres = find_centres(x_nd, min(self._n_centres, len(x_nd)), self._settings.seed)
        generator = torch.Generator().manual_seed(self._settings.seed)
        rows, n = torch.arange(self._settings.d_sae), len(centres)
        first = rows % n
        second = (first + torch.randint(1, n, first.shape, generator=generator)) % n
        share = torch.where(rows < n, 1.0, 0.5)
        mix = torch.zeros(len(rows), n)
        mix[rows, first] = share
        mix[rows, second] = 1 - share
        weights.fixed["centres"] = centres
        weights.extra |= {"mix": mix, "shift": torch.zeros_like(weights.W_dec)}
        self.constrain(weights)
        weights.W_enc.copy_(weights.W_dec)
        fit_scale(weights, x_nd, self._settings.k)

    def step(self, weights: Weights, batch: Batch, guides: Guides, dead: Int[Tensor, " n_dead"]) -> Step:
        """See `Variant`."""
        step = super().step(weights, batch, guides, dead)
        grad = grad_of(weights.W_dec)
        along = torch.linalg.vecdot(grad, weights.W_dec)[:, None]
        grad_raw = torch.addcmul(grad, along, weights.W_dec, value=-1).div_(weights.fixed["lengths"])
        grad_of(weights.extra["shift"]).copy_(grad_raw)
        torch.mm(grad_raw, weights.fixed["centres"].T, out=grad_of(weights.extra["mix"]))
        return step

    def constrain(self, weights: Weights) -> None:
        """Project the rows of A onto the simplex and those of Λ into their balls, and recompute W_dec."""
        mix, shift = weights.extra["mix"].clamp_(min=0), weights.extra["shift"]
        mix.div_(mix.sum(1, keepdim=True).clamp_min(1e-12))
        combined = mix @ weights.fixed["centres"]
        most = self._relaxation * combined.norm(dim=1, keepdim=True)
        shift.mul_((most / shift.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp(max=1))
        weights.fixed["lengths"] = combined.add_(shift).norm(dim=1, keepdim=True)
        torch.div(combined, weights.fixed["lengths"], out=weights.W_dec)


def make(params: variants.Archetypal, settings: Settings) -> Archetypal:
    """Make the variant from its parameters."""
    return Archetypal(settings, params.points, params.relaxation)
