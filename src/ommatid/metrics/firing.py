"""On how many tokens and images latents fire, and on which images most strongly."""

import math

import torch
from torch import Tensor


class Firing:
    """Per latent: on how many tokens and images it fires, and how strongly."""

    def __init__(self, d_sae: int) -> None:
        self.n_tokens = 0
        self.count = torch.zeros(d_sae, dtype=torch.int64)
        self.n_images = torch.zeros(d_sae, dtype=torch.int64)
        self.sum = torch.zeros(d_sae, dtype=torch.float64)
        self.max = torch.zeros(d_sae, dtype=torch.float64)

    def add(self, acts_bs: Tensor, image_acts_bs: Tensor) -> None:
        """Add token activations (tokens, d_sae) and the same images' image-level activations (images, d_sae)."""
        self.n_tokens += acts_bs.shape[0]
        self.count += (acts_bs > 0).sum(0)
        self.n_images += (image_acts_bs > 0).sum(0)
        self.sum += acts_bs.sum(0, dtype=torch.float64)
        self.max = torch.maximum(self.max, acts_bs.amax(0).double())

    @property
    def density(self) -> Tensor:
        """Share of tokens on which each latent fires, (d_sae,)."""
        return self.count.double() / max(self.n_tokens, 1)

    @property
    def mean(self) -> Tensor:
        """Mean activation over the tokens on which a latent fires, (d_sae,); NaN if it never does."""
        return self.sum / self.count.double()

    @property
    def is_dead(self) -> Tensor:
        """Never fired, (d_sae,)."""
        return self.count == 0


class TopImages:
    """The images on which each latent is strongest, found in a stream; ties go to the earlier image."""

    def __init__(self, d_sae: int, n: int) -> None:
        self.acts = torch.full((n, d_sae), -math.inf)
        self.images = torch.full((n, d_sae), -1, dtype=torch.int64)

    def add(self, acts_bs: Tensor, images_b: Tensor) -> None:
        """Image-level activations (images, d_sae) and the images' numbers (images,)."""
        acts = torch.cat([self.acts, acts_bs.float()])
        images = torch.cat([self.images, images_b[:, None].expand(-1, acts_bs.shape[1])])
        order = torch.sort(acts, dim=0, descending=True, stable=True).indices[: self.acts.shape[0]]
        self.acts, self.images = acts.gather(0, order), images.gather(0, order)
