"""Which latents fire on the same images."""

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
