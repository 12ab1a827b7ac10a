"""Matryoshka BatchTopK: the first latents must reconstruct by themselves, so that they become general and later ones specific."""

import torch

from ommatid.config import variants
from ommatid.sae.entries import Levels
from ommatid.sae.variants.base import Guides, Settings
from ommatid.sae.variants.batch_topk import BatchTopK


class Matryoshka(BatchTopK):
    """BatchTopK with loss = mean over levels l of mean ‖x̂_l − x‖² + AuxK, where x̂_l uses the first n_l latents (arXiv 2503.17547).

    Firing latents are selected once, over the whole dictionary. The sum over levels is divided once by the number of levels; two public
    trainers divide twice, which makes AuxK several times as strong as intended. The bounds n_l are fixed, or drawn at every step with
    probabilities that fall as 1 / n (Pareto). Either way there is one for each of `train.variant.prefixes`, and the last is d_sae.
    """

    def __init__(self, settings: Settings, shares: tuple[float, ...], random: bool) -> None:
        super().__init__(settings)
        bounds = tuple(dict.fromkeys(max(1, round(share * settings.d_sae)) for share in shares))
        self._levels = Levels(bounds, settings.device)
        self._random = random

    def prefixes(self) -> tuple[int, ...] | None:
        """Return the fixed bounds of the levels."""
        return self._levels.bounds

    def _levels_of(self, guides: Guides) -> Levels:
        n, d_sae = self._levels.n, self._settings.d_sae
        if not self._random or n == 1:
            return self._levels
        generator = torch.Generator().manual_seed((self._settings.seed * 1_000_003 + guides.step) % 2**63)
        shares = 1 / torch.arange(1, d_sae, dtype=torch.float64)
        drawn = torch.multinomial(shares, min(n - 1, d_sae - 1), generator=generator) + 1
        return Levels((*sorted(drawn.tolist()), d_sae), self._settings.device)


def make(params: variants.Matryoshka, settings: Settings) -> Matryoshka:
    """Make the variant from its parameters."""
    return Matryoshka(settings, params.prefixes, params.random)
