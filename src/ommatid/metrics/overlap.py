"""Overlap of the images on which latents fire: co-firing and uniqueness."""

import math

import torch
from jaxtyping import Float32, Float64, Int
from torch import Tensor


class CoFiring:
    """Counts the images on which each latent of a tile fires together with each latent of the SAE.

    Of n images, let latent a fire on n_a, latent b on n_b, and both on n_ab. Lift = n · n_ab / (n_a · n_b) is the ratio of n_ab to its
    expected value if a and b were independent. Jaccard = n_ab / (n_a + n_b − n_ab) is the share of images on which both fire among those
    on which at least one does.

    Counts are float32, in which the product is fast. Sums of 0 and 1 are exact up to 2^24 images.
    """

    def __init__(self, tile: range, d_sae: int) -> None:
        self.counts = torch.zeros(len(tile), d_sae)
        self.n_firing = torch.zeros(d_sae, dtype=torch.float64)
        self._tile = slice(tile.start, tile.stop)

    def add(self, fires_bs: Float32[Tensor, "images d_sae"]) -> None:
        """Add images, with 1 where a latent fires and 0 elsewhere, `(images, d_sae)` float32. Images without firings may be left out."""
        self.counts.addmm_(fires_bs[:, self._tile].T, fires_bs)
        self.n_firing += fires_bs.sum(0, dtype=torch.float64)

    def merge(self, other: "CoFiring") -> None:
        """Add the images of another accumulator for the same tile."""
        self.counts += other.counts
        self.n_firing += other.n_firing

    def lift(self, rows: slice, n_images: int) -> Float64[Tensor, "rows d_sae"]:
        """Return the lift of some latents of the tile with each latent, `(rows, d_sae)` float64; NaN where either never fires."""
        assert n_images < 2**24, n_images
        n_rows = self.n_firing[self._tile][rows]
        return self.counts[rows].double() * n_images / (n_rows[:, None] * self.n_firing)

    def jaccard(self, rows: slice) -> Float64[Tensor, "rows d_sae"]:
        """Return the Jaccard index of some latents of the tile with each latent, `(rows, d_sae)` float64; 0 where neither ever fires."""
        n_rows, both = self.n_firing[self._tile][rows], self.counts[rows].double()
        return both / (n_rows[:, None] + self.n_firing - both).clamp_min(1)


LATENTS_PER_STEP = 256
"""Number of latents whose overlaps with all latents are counted at a time."""


def uniqueness(images_sn: Int[Tensor, "latents n"]) -> Float64[Tensor, " latents"]:
    """Compute 1 − the largest Jaccard index of a latent's strongest images with those of any other latent.

    Args:
        images_sn: The n strongest images of each latent, `(latents, n)` int64, padded with -1.

    Returns:
        The uniqueness, `(latents,)` float64: 1 if a latent shares none of the images with another, 0 if another has the same ones. A latent
        with fewer than n images has none (NaN), and is not compared with others: small sets are easily equal by chance.
    """
    n_latents, n = images_sn.shape
    found = torch.full((n_latents,), math.nan, dtype=torch.float64)
    full = (images_sn >= 0).all(1).nonzero()[:, 0]
    sets = images_sn[full]
    for start in range(0, len(full), LATENTS_PER_STEP):
        chosen = torch.arange(start, min(start + LATENTS_PER_STEP, len(full)))
        overlap = _overlaps(sets, chosen)
        overlap[chosen, torch.arange(len(chosen))] = 0  # The overlap of a latent with itself.
        most = overlap.amax(0).double()
        found[full[chosen]] = 1 - most / (2 * n - most)
    return found


def _overlaps(sets_sn: Int[Tensor, "latents n"], chosen: Int[Tensor, " chosen"]) -> Float32[Tensor, "latents chosen"]:
    """Return the number of images that each latent shares with each chosen latent, `(latents, chosen)` float32."""
    images = sets_sn[chosen].unique()
    place = torch.searchsorted(images, sets_sn).clamp_max(len(images) - 1)
    place[images[place] != sets_sn] = len(images)  # The last row, which is zero, is for images that no chosen latent has.
    is_in = torch.zeros(len(images) + 1, len(chosen))
    is_in[place[chosen].flatten(), torch.arange(len(chosen)).repeat_interleave(sets_sn.shape[1])] = 1
    return torch.nn.functional.embedding_bag(place, is_in, mode="sum")
