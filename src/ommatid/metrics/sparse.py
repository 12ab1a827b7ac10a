"""Activations stored by their non-zero entries. Most latents do not fire on most images, and zeros then cost nothing."""

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from ommatid.compute.nonzero import true_at

FEW = 0.08
"""Share of non-zero activations below which sparse products are faster than dense ones (measured: 0.09)."""

with warnings.catch_warnings():  # torch warns once per process that sparse CSR support is in beta.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


@dataclass(frozen=True)
class Entries:
    """The non-zero entries of image-level activations `(images, d_sae)`."""

    images: Int[Tensor, " entries"]
    """Image (row) of each entry, `(entries,)` int64, ascending."""
    latents: Int[Tensor, " entries"]
    """Latent (column) of each entry, `(entries,)` int64."""
    acts: Float64[Tensor, " entries"]
    """Activation of each entry, `(entries,)` float64, not 0."""
    shape: tuple[int, int]
    """Shape of the activations, `(images, d_sae)`."""

    @classmethod
    def of(cls, acts_bs: Float[Tensor, "images d_sae"]) -> "Entries | None":
        """Make entries from activations, dense or in CSR form. Return None if so many are non-zero that dense products are faster."""
        n, d_sae = acts_bs.shape
        is_dense = acts_bs.layout == torch.strided
        fires = acts_bs.bool() if is_dense else acts_bs.values().bool()
        if int(fires.count_nonzero()) >= FEW * n * d_sae:
            return None
        if not is_dense:
            images = torch.arange(n).repeat_interleave(acts_bs.crow_indices().diff())
            latents, acts = acts_bs.col_indices().long(), acts_bs.values().double()
            return cls(images[fires], latents[fires], acts[fires], (n, d_sae))
        at = true_at(fires)
        images, latents = at // d_sae, at % d_sae
        return cls(images, latents, acts_bs[images, latents].double(), (n, d_sae))

    @cached_property
    def n_firing(self) -> Int[Tensor, " d_sae"]:
        """Number of images on which each latent fires, `(d_sae,)` int64."""
        return torch.bincount(self.latents, minlength=self.shape[1])

    def sums(self, values: Float64[Tensor, " entries"]) -> Float64[Tensor, " d_sae"]:
        """Sum values of entries, `(entries,)`, by latent, `(d_sae,)` float64."""
        return torch.bincount(self.latents, values, minlength=self.shape[1]).double()  # Without entries, bincount returns int64.

    def extremes(self) -> tuple[Float64[Tensor, " d_sae"], Float64[Tensor, " d_sae"]]:
        """Return the smallest and the largest activation of each latent, zeros included, `(d_sae,)` float64 each."""
        has_zero = self.n_firing < self.shape[0]
        low = torch.full((self.shape[1],), torch.inf, dtype=torch.float64).scatter_reduce_(0, self.latents, self.acts, "amin")
        high = torch.full((self.shape[1],), -torch.inf, dtype=torch.float64).scatter_reduce_(0, self.latents, self.acts, "amax")
        return torch.where(has_zero, low.clamp(max=0), low), torch.where(has_zero, high.clamp(min=0), high)

    def transposed(self) -> Float64[Tensor, "d_sae images"]:
        """Return the transposed activations, `(d_sae, images)` float64 in CSR form."""
        by_latent = torch.sort(self.latents, stable=True).indices
        starts = torch.zeros(self.shape[1] + 1, dtype=torch.int64)
        torch.cumsum(self.n_firing, 0, out=starts[1:])
        return torch.sparse_csr_tensor(starts, self.images[by_latent], self.acts[by_latent], (self.shape[1], self.shape[0]))
