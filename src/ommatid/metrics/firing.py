"""Firing statistics: on how many tokens and images each latent fires, and on which images most strongly."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from ommatid.compute.checkpoint import Accumulator
from ommatid.compute.nonzero import count_positive

DENSE = 0.1
"""Share of tokens above which a latent is dense. Dense latents represent position, norm or context rather than one thing that occurs in
some images (arXiv 2506.15679)."""
RARE = 16
"""Number of images below which a latent that fires is rare: metrics of its 16 strongest images (purity, uniqueness) are then undefined."""


class Firing(Accumulator):
    """Accumulates, for each latent, on how many tokens and images it fires, and how strongly."""

    STATE = ("n_tokens", "count", "n_images", "sum", "max")

    def __init__(self, d_sae: int) -> None:
        self.n_tokens = 0
        """Number of tokens added."""
        self.count = torch.zeros(d_sae, dtype=torch.int64)
        """Number of tokens on which each latent fires, `(d_sae,)`."""
        self.n_images = torch.zeros(d_sae, dtype=torch.int64)
        """Number of images on which each latent fires, `(d_sae,)`."""
        self.sum = torch.zeros(d_sae, dtype=torch.float64)
        """Sum of each latent's activations, `(d_sae,)`."""
        self.max = torch.zeros(d_sae, dtype=torch.float64)
        """Largest activation of each latent, `(d_sae,)`."""

    def add(self, acts_bs: Float[Tensor, "tokens d_sae"], image_acts_bs: Float[Tensor, "images d_sae"]) -> None:
        """Add token activations `(tokens, d_sae)` and the image-level activations `(images, d_sae)` of the same images."""
        self.n_tokens += acts_bs.shape[0]
        self.count += count_positive(acts_bs)
        self.n_images += count_positive(image_acts_bs)
        self.sum += acts_bs.sum(0).double()  # A batch is summed in the dtype of the data, and batches in float64.
        self.max = torch.maximum(self.max, acts_bs.amax(0).double())

    @property
    def density(self) -> Float64[Tensor, " d_sae"]:
        """Share of tokens on which each latent fires, `(d_sae,)`."""
        return self.count.double() / max(self.n_tokens, 1)

    @property
    def mean(self) -> Float64[Tensor, " d_sae"]:
        """Mean activation over the tokens on which a latent fires, `(d_sae,)`; NaN if it never fires."""
        return self.sum / self.count.double()

    @property
    def is_dead(self) -> Bool[Tensor, " d_sae"]:
        """Whether each latent never fires, `(d_sae,)`."""
        return self.count == 0

    @property
    def is_dense(self) -> Bool[Tensor, " d_sae"]:
        """Whether each latent fires on more than the share `DENSE` of tokens, `(d_sae,)`."""
        return self.density > DENSE

    @property
    def is_rare(self) -> Bool[Tensor, " d_sae"]:
        """Whether each latent fires, but on fewer than `RARE` images, `(d_sae,)`."""
        return (self.n_images > 0) & (self.n_images < RARE)


@dataclass(frozen=True)
class Decade:
    """A bin of the density histogram, for densities of one order of magnitude."""

    low: float
    """Lowest density of the bin; 0 for the bin of latents that never fire."""
    high: float
    """Upper bound of the density, exclusive except for 1."""
    n_latents: int
    """Number of latents in the bin."""


def density_histogram(density_s: Float[Tensor, " d_sae"], n_tokens: int) -> list[Decade]:
    """Count latents by the order of magnitude of their density.

    Args:
        density_s: Density of each latent, `(d_sae,)`.
        n_tokens: Number of tokens on which densities were measured.

    Returns:
        A bin for dead latents, then one for each decade, from the decade of a single firing to that from 0.1 to 1.
    """
    lowest = math.floor(math.log10(1 / n_tokens)) if n_tokens else -1
    edges = torch.tensor([10.0**power for power in range(lowest, 0)], dtype=torch.float64)
    counts = torch.bincount(torch.bucketize(density_s.double(), edges, right=True), minlength=len(edges) + 1)
    lows, highs = [0.0, *edges.tolist()], [0.0, *edges.tolist()[1:], 1.0]
    return [Decade(*row) for row in zip(lows, highs, counts.tolist(), strict=True)]


class TopImages(Accumulator):
    """Finds the images on which each latent is strongest in a stream of images. Of tied images, the one with the lower number wins.

    Args:
        d_sae: Number of latents.
        n: Number of images to find for each latent.
        floor: Value that says nothing about an image, such as 0 for activations: images that share it may be chosen in any order.
    """

    STATE = ("acts", "images")

    def __init__(self, d_sae: int, n: int, floor: float = 0.0) -> None:
        self._floor = floor
        self.acts = torch.full((n, d_sae), -math.inf)
        """The n largest activations of each latent, `(n, d_sae)`, in descending order; minus infinity until there are n images."""
        self.images = torch.full((n, d_sae), -1, dtype=torch.int64)
        """Numbers of the images with these activations, `(n, d_sae)`; -1 until there are n images."""

    def add(self, acts_bs: Float[Tensor, "images d_sae"], images_b: Int[Tensor, " images"]) -> None:
        """Add image-level activations `(images, d_sae)` and the numbers of the images `(images,)`."""
        # Only latents that gain an image are updated, which are soon few: the floor itself changes nothing after n images.
        new = ((acts_bs >= self.acts[-1]) & (acts_bs > self._floor) | (acts_bs > self.acts[-1])).any(0).nonzero()[:, 0]
        acts = torch.cat([self.acts[:, new], acts_bs[:, new].float()])
        images, by_image = torch.cat([self.images[:, new], images_b[:, None].expand(-1, len(new))]).sort(dim=0, stable=True)
        acts = acts.gather(0, by_image)
        order = torch.sort(acts, dim=0, descending=True, stable=True).indices[: len(self.acts)]
        self.acts[:, new], self.images[:, new] = acts.gather(0, order), images.gather(0, order)
