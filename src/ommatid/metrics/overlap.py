"""Which images latents share: co-firing and uniqueness."""

import math

import torch
from torch import Tensor


class CoFiring:
    """On how many images the latents of a tile fire together with each latent.

    With n_a, n_b and n_ab the images on which a, b and both fire, of n images: lift = n · n_ab / (n_a · n_b), how many times as often
    as independent latents would; Jaccard = n_ab / (n_a + n_b − n_ab), the share of the images of either that are of both.

    Counts are float32, in which the product is fast: sums of 0 and 1 are exact up to 2^24 images.
    """

    def __init__(self, tile: range, d_sae: int) -> None:
        self.counts = torch.zeros(len(tile), d_sae)
        self.n_firing = torch.zeros(d_sae, dtype=torch.float64)
        self._tile = slice(tile.start, tile.stop)

    def add(self, fires_bs: Tensor) -> None:
        """Which latents fire on some images, (images, d_sae) float32, 0 or 1; images on which none fires may be left out."""
        self.counts.addmm_(fires_bs[:, self._tile].T, fires_bs)
        self.n_firing += fires_bs.sum(0, dtype=torch.float64)

    def merge(self, other: "CoFiring") -> None:
        """Take in what another accumulator of the same tile has seen."""
        self.counts += other.counts
        self.n_firing += other.n_firing

    def lift(self, rows: slice, n_images: int) -> Tensor:
        """Of some latents of the tile with each latent, (rows, d_sae) float64; NaN where one of them never fires."""
        assert n_images < 2**24, n_images
        mine = self.n_firing[self._tile][rows]
        return self.counts[rows].double() * n_images / (mine[:, None] * self.n_firing)

    def jaccard(self, rows: slice) -> Tensor:
        """Of some latents of the tile with each latent, (rows, d_sae) float64; 0 where neither ever fires."""
        mine, both = self.n_firing[self._tile][rows], self.counts[rows].double()
        return both / (mine[:, None] + self.n_firing - both).clamp_min(1)


LATENTS_PER_STEP = 256
"""Whose overlaps with all others are counted at once."""


def uniqueness(images_sn: Tensor) -> Tensor:
    """1 − largest Jaccard of a latent's set of strongest images with that of any other latent, (latents,) float64.

    1: it shares none of them with another; 0: another has the very same.

    Args:
        images_sn: The n strongest images of each latent, (latents, n) int64, -1 where there are fewer. A latent with fewer has no
            uniqueness (NaN) and is no other's partner: among sets of one or two images equal ones are chance.
    """
    n_latents, n = images_sn.shape
    found = torch.full((n_latents,), math.nan, dtype=torch.float64)
    full = (images_sn >= 0).all(1).nonzero()[:, 0]
    sets = images_sn[full]
    for start in range(0, len(full), LATENTS_PER_STEP):
        chosen = torch.arange(start, min(start + LATENTS_PER_STEP, len(full)))
        overlap = _overlaps(sets, chosen)
        overlap[chosen, torch.arange(len(chosen))] = 0  # with itself
        most = overlap.amax(0).double()
        found[full[chosen]] = 1 - most / (2 * n - most)
    return found


def _overlaps(sets_sn: Tensor, chosen: Tensor) -> Tensor:
    """How many images each latent has in common with each chosen one, (latents, chosen) float32."""
    images = sets_sn[chosen].unique()
    place = torch.searchsorted(images, sets_sn).clamp_max(len(images) - 1)
    place[images[place] != sets_sn] = len(images)  # a row of zeros for images that no chosen latent has
    is_in = torch.zeros(len(images) + 1, len(chosen))
    is_in[place[chosen].flatten(), torch.arange(len(chosen)).repeat_interleave(sets_sn.shape[1])] = 1
    return torch.nn.functional.embedding_bag(place, is_in, mode="sum")
