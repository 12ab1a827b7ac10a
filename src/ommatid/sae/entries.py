"""Entries: the (token, latent) pairs of a batch at which a latent may fire, and the products that training computes at those pairs.

`Sparse` stores entries as compressed rows: the reconstruction, the sampled product and the weight gradients cost entries · d_model each.
`Dense` stores the whole matrix: these products cost batch · d_sae · d_model each, but are faster above some density. Tests compare the
two.

A Matryoshka dictionary has several levels: level l reconstructs with the latents below its bound. Other dictionaries have one level.
Suffixes of names: b tokens of the batch, l levels, d d_model, s latents, n entries.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

LATENTS_PER_CHUNK = 512
"""Number of latents whose weight gradients are computed together without MKL. The system would zero larger allocations each time."""
HAS_MKL = torch.backends.mkl.is_available()
"""Whether torch has MKL, whose sparse product takes half the time of `embedding_bag` and writes into a given tensor."""


with warnings.catch_warnings():  # torch warns once per process that sparse CSR support is in beta.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


class Levels:
    """Levels of a dictionary: level l consists of the latents below `bounds[l]`. Bounds increase, and the last is d_sae."""

    def __init__(self, bounds: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self.bounds = bounds
        self._inner = torch.tensor(bounds[:-1], device=device)

    @property
    def n(self) -> int:
        """Number of levels."""
        return len(self.bounds)

    def of(self, latents: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Return the first level that each latent belongs to."""
        return torch.bucketize(latents, self._inner, right=True)

    def slices(self) -> list[slice]:
        """Return, for each level, the latents that it adds to the previous one."""
        return [slice(start, end) for start, end in zip((0, *self.bounds), self.bounds, strict=False)]


@dataclass(frozen=True)
class Sparse:
    """Some entries of a batch, ordered by token. Latents fire at no other entries."""

    n_tokens: int
    """Number of tokens in the batch."""
    levels: Levels
    """Levels of the dictionary."""
    rows: Int[Tensor, " entries"]
    """Token of each entry, `(n,)`, ascending."""
    latents: Int[Tensor, " entries"]
    """Latent of each entry, `(n,)`, ascending within a token."""
    values: Float[Tensor, " entries"]
    """Pre-activation of each entry, `(n,)`."""

    def at(self, of_latent: Float[Tensor, " d_sae"]) -> Float[Tensor, " entries"]:
        """Look up a value per latent, `(d_sae,)`, for each entry, `(n,)`."""
        return of_latent[self.latents]

    def sum_by_latent(self, values: Float[Tensor, " entries"]) -> Float[Tensor, " d_sae"]:
        """Sum values of entries, `(n,)`, by latent, `(d_sae,)`."""
        return torch.zeros(self.levels.bounds[-1], dtype=values.dtype, device=values.device).index_add_(0, self.latents, values)

    def max_by_latent(self, values: Float[Tensor, " entries"]) -> Float[Tensor, " d_sae"]:
        """Return the largest value among each latent's entries, or 0 if that is larger or there are none, `(d_sae,)`."""
        zeros = torch.zeros(self.levels.bounds[-1], dtype=values.dtype, device=values.device)
        return zeros.scatter_reduce_(0, self.latents, values, "amax")

    def firing_latents(self, acts: Float[Tensor, " entries"]) -> Int[Tensor, " firings"]:
        """Return the latent of each firing, given the activations of entries, `(n,)`: a latent appears once for each token it fires on."""
        return self.latents[acts > 0]

    def decode(self, acts: Float[Tensor, " entries"], W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "batch levels d_out"]:
        """Return what each level adds to the reconstruction, without the bias, `(batch, levels, d_out)`."""
        starts = torch.searchsorted(self._bags, torch.arange(self.n_tokens * self.levels.n, device=self.rows.device))
        return embedding_bag(self.latents, W_dec, starts, mode="sum", per_sample_weights=acts).unflatten(0, (-1, self.levels.n))

    def product(self, table_bld: Float[Tensor, "batch levels d"], directions_sd: Float[Tensor, "d_sae d"]) -> Float[Tensor, " entries"]:
        """Return, for each entry, the dot product of its latent's direction and the table's row for its token and level, `(n,)`.

        Entries are visited latent by latent: the table is smaller than the dictionary, so more of it stays in the cache.
        """
        table, (order, bounds) = table_bld.flatten(0, 1), self._by_latent
        rows, zeros = self._bags_of(table_bld).index_select(0, order), torch.zeros_like(self.values)
        pattern = torch.sparse_csr_tensor(bounds, rows, zeros, (len(directions_sd), len(table)), check_invariants=False)
        found = torch.sparse.sampled_addmm(pattern, directions_sd, table.T, beta=0.0).values()
        return zeros.scatter_(0, order, found)

    def weighted_sums(
        self, weights: Float[Tensor, " entries"], table_bld: Float[Tensor, "batch levels d"], out_sd: Float[Tensor, "d_sae d"]
    ) -> None:
        """Compute, for each latent, the weighted sum of the table's rows for its entries.

        Args:
            weights: Weight of each entry, `(n,)`.
            table_bld: A row for each token and level, `(batch, levels, d)`, or for each token, `(batch, 1, d)`.
            out_sd: Output, `(d_sae, d)`, overwritten.
        """
        order, bounds = self._by_latent
        rows, sorted_weights = (t.index_select(0, order) for t in (self._bags_of(table_bld), weights))
        table = table_bld.flatten(0, 1)
        if HAS_MKL and not out_sd.is_cuda:
            pattern = torch.sparse_csr_tensor(bounds, rows, sorted_weights, (len(out_sd), len(table)), check_invariants=False)
            torch.addmm(out_sd, pattern, table, beta=0, out=out_sd)
        else:
            _sum_bags(rows, sorted_weights, table, bounds, out_sd)

    def _bags_of(self, table_bld: Float[Tensor, "batch levels d"]) -> Int[Tensor, " entries"]:
        """Return each entry's row in a table that has one level or all of them."""
        return self.rows if table_bld.shape[1] == 1 else self._bags

    @cached_property
    def _bags(self) -> Int[Tensor, " entries"]:
        """Row of each entry in a table of all tokens and levels, ascending."""
        return self.rows if self.levels.n == 1 else self.rows * self.levels.n + self.levels.of(self.latents)

    @cached_property
    def _by_latent(self) -> tuple[Int[Tensor, " entries"], Int[Tensor, " bounds"]]:
        """The permutation that orders entries by latent, and the `(d_sae + 1,)` bounds of each latent's entries in that order."""
        latents, order = self.latents.sort(stable=True)
        n = self.levels.bounds[-1]
        return order, torch.searchsorted(latents, torch.arange(n + 1, device=latents.device))


@dataclass(frozen=True)
class Dense:
    """All entries of a batch. Where a latent does not fire, its activation and the gradient with respect to it are 0."""

    levels: Levels
    """Levels of the dictionary."""
    values: Float[Tensor, "batch d_sae"]
    """Pre-activations, `(batch, d_sae)`."""

    def at(self, of_latent: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
        """See `Sparse`."""
        return of_latent

    def sum_by_latent(self, values: Float[Tensor, "batch d_sae"]) -> Float[Tensor, " d_sae"]:
        """See `Sparse`."""
        return values.sum(0)

    def max_by_latent(self, values: Float[Tensor, "batch d_sae"]) -> Float[Tensor, " d_sae"]:
        """See `Sparse`."""
        return values.amax(0).clamp_min(0)

    def firing_latents(self, acts: Float[Tensor, "batch d_sae"]) -> Int[Tensor, " firings"]:
        """See `Sparse`."""
        return (acts > 0).nonzero()[:, 1]

    def decode(self, acts: Float[Tensor, "batch d_sae"], W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "batch levels d_out"]:
        """See `Sparse`."""
        return torch.stack([acts[:, part] @ W_dec[part] for part in self.levels.slices()], dim=1)

    def product(self, table_bld: Float[Tensor, "batch levels d"], directions_sd: Float[Tensor, "d_sae d"]) -> Float[Tensor, "batch d_sae"]:
        """See `Sparse`."""
        parts = self._levels_of(table_bld)
        return torch.cat([table_bld[:, level] @ directions_sd[part].T for level, part in parts], dim=1)

    def weighted_sums(
        self, weights: Float[Tensor, "batch d_sae"], table_bld: Float[Tensor, "batch levels d"], out_sd: Float[Tensor, "d_sae d"]
    ) -> None:
        """See `Sparse`."""
        for level, part in self._levels_of(table_bld):
            torch.mm(weights[:, part].T, table_bld[:, level], out=out_sd[part])

    def _levels_of(self, table_bld: Float[Tensor, "batch levels d"]) -> list[tuple[int, slice]]:
        return [(0, slice(None))] if table_bld.shape[1] == 1 else list(enumerate(self.levels.slices()))


Entries = Sparse | Dense


def _sum_bags(
    rows: Int[Tensor, " entries"],
    weights: Float[Tensor, " entries"],
    table: Float[Tensor, "bags d"],
    bounds: Int[Tensor, " bounds"],
    out_sd: Float[Tensor, "d_sae d"],
) -> None:
    """Compute `Sparse.weighted_sums` for entries that are ordered by latent, with each latent's first entry in `bounds`."""
    firsts = range(0, len(out_sd), LATENTS_PER_CHUNK)
    ends = bounds[[*firsts, len(out_sd)]].tolist()
    for i, first in enumerate(firsts):
        chunk, entries = slice(first, first + LATENTS_PER_CHUNK), slice(ends[i], ends[i + 1])
        starts = bounds[:-1][chunk] - ends[i]
        out_sd[chunk] = embedding_bag(rows[entries], table, starts, mode="sum", per_sample_weights=weights[entries])
