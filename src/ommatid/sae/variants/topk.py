"""TopK: the number of latents that fire on a token is fixed, so no sparsity penalty is needed."""

import torch
from torch import Tensor

from ommatid.config import variants
from ommatid.sae.entries import Entries
from ommatid.sae.model import Activation
from ommatid.sae.select import FLOOR_SHARE, Scorer, select_token
from ommatid.sae.variants.base import Guides, Settings
from ommatid.sae.variants.batch_topk import BatchTopK
from ommatid.sae.weights import Weights


class TopK(BatchTopK):
    """TopK SAE (arXiv 2406.04093): acts = pre_acts where they are among the k largest positive ones of their token, else 0."""

    activation: Activation = "topk"

    def _select(self, scorer: Scorer, guides: Guides) -> tuple[Entries, float]:
        entries, guides.floor = select_token(scorer, self._settings.k, FLOOR_SHARE * guides.floor)
        return entries, 0.0

    def thresholds(self, weights: Weights, average: float) -> dict[str, Tensor]:
        """Return threshold 0: the k largest latents fire."""
        return {"threshold": torch.tensor(0.0)}


def make(params: variants.TopK, settings: Settings) -> TopK:
    """Make the variant from its parameters."""
    return TopK(settings)
