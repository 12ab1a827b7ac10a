"""Entries: where latents fire in a batch, and the products of training over those entries alone.

`Sparse` holds them as compressed rows: reconstruction, sampled product and weight gradients then cost entries · d_model each. `Dense`
holds the whole matrix, and costs batch · d_sae · d_model each: it is faster above some density, and the oracle below.

A dictionary may have levels (Matryoshka): level l reconstructs with the latents below its bound. Without, there is one.
Suffixes: b tokens of the batch, l levels, d d_model, s latents, n entries.
"""

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

LATENTS_PER_CHUNK = 512
"""Of weight gradients made at once without MKL: new memory stays small, for large pieces have to be zeroed by the system each time."""
HAS_MKL = torch.backends.mkl.is_available()
"""Whose product of compressed rows takes half the time of bags, and writes where it is told to."""


with warnings.catch_warnings():  # torch says once a process that compressed rows are in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


class Levels:
    """Bounds of the prefixes of a dictionary, rising to d_sae."""

    def __init__(self, bounds: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self.bounds = bounds
        self._inner = torch.tensor(bounds[:-1], device=device)

    @property
    def n(self) -> int:
        """How many."""
        return len(self.bounds)

    def of(self, latents: Tensor) -> Tensor:
        """The level in which a latent first takes part."""
        return torch.bucketize(latents, self._inner, right=True)

    def slices(self) -> list[slice]:
        """The latents that each level adds."""
        return [slice(start, end) for start, end in zip((0, *self.bounds), self.bounds, strict=False)]


@dataclass(frozen=True)
class Sparse:
    """Entries ordered by token."""

    n_tokens: int
    """Tokens of the batch."""
    levels: Levels
    """Of the dictionary."""
    rows: Tensor
    """Token of each entry, (n,), ascending."""
    latents: Tensor
    """Latent of each entry, (n,), ascending within a token."""
    values: Tensor
    """Pre-activation of each entry, (n,)."""

    def at(self, of_latent: Tensor) -> Tensor:
        """A value a latent, (d_sae,), at each entry."""
        return of_latent[self.latents]

    def sum_by_latent(self, values: Tensor) -> Tensor:
        """Sums of values at entries, (d_sae,)."""
        return torch.zeros(self.levels.bounds[-1], dtype=values.dtype, device=values.device).index_add_(0, self.latents, values)

    def max_by_latent(self, values: Tensor) -> Tensor:
        """Largest of values at entries, at least 0, (d_sae,)."""
        zeros = torch.zeros(self.levels.bounds[-1], dtype=values.dtype, device=values.device)
        return zeros.scatter_reduce_(0, self.latents, values, "amax")

    def fired(self, acts: Tensor) -> Tensor:
        """Latents that fire, with repetitions; acts are of the entries."""
        return self.latents[acts > 0]

    def decode(self, acts: Tensor, W_dec: Tensor) -> Tensor:
        """What each level adds to the reconstruction, without bias: (batch, levels, d_model)."""
        starts = torch.searchsorted(self._bags, torch.arange(self.n_tokens * self.levels.n, device=self.rows.device))
        return embedding_bag(self.latents, W_dec, starts, mode="sum", per_sample_weights=acts).unflatten(0, (-1, self.levels.n))

    def product(self, table_bld: Tensor, directions_sd: Tensor) -> Tensor:
        """What table · direction is at the entries, with the row of the entry's token and level, (n,).

        Latent by latent: the table is smaller than the dictionary, and more of it stays in the cache.
        """
        table, (order, bounds) = table_bld.flatten(0, 1), self._by_latent
        rows, zeros = self._bags_of(table_bld).index_select(0, order), torch.zeros_like(self.values)
        pattern = torch.sparse_csr_tensor(bounds, rows, zeros, (len(directions_sd), len(table)), check_invariants=False)
        found = torch.sparse.sampled_addmm(pattern, directions_sd, table.T, beta=0.0).values()
        return zeros.scatter_(0, order, found)

    def gather(self, weights: Tensor, table_bld: Tensor, out_sd: Tensor) -> None:
        """For each latent the weighted sum of the table's rows (of token and level) over its entries, into (d_sae, d_model)."""
        order, bounds = self._by_latent
        rows, sorted_weights = (own.index_select(0, order) for own in (self._bags_of(table_bld), weights))
        table = table_bld.flatten(0, 1)
        if HAS_MKL and not out_sd.is_cuda:
            pattern = torch.sparse_csr_tensor(bounds, rows, sorted_weights, (len(out_sd), len(table)), check_invariants=False)
            torch.addmm(out_sd, pattern, table, beta=0, out=out_sd)
        else:
            _gather_bags(rows, sorted_weights, table, bounds, out_sd)

    def _bags_of(self, table_bld: Tensor) -> Tensor:
        """Each entry's row in a table with one level, or with all."""
        return self.rows if table_bld.shape[1] == 1 else self._bags

    @cached_property
    def _bags(self) -> Tensor:
        """Row of each entry in a table of tokens and levels, ascending."""
        return self.rows if self.levels.n == 1 else self.rows * self.levels.n + self.levels.of(self.latents)

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor]:
        """The order of the entries by latent, and where each latent's begin and the last's end."""
        latents, order = self.latents.sort(stable=True)
        n = self.levels.bounds[-1]
        return order, torch.searchsorted(latents, torch.arange(n + 1, device=latents.device))


@dataclass(frozen=True)
class Dense:
    """All entries of the batch, also those where nothing fires: there activations and their gradients are 0."""

    levels: Levels
    """Of the dictionary."""
    values: Tensor
    """Pre-activations, (batch, d_sae)."""

    def at(self, of_latent: Tensor) -> Tensor:
        """See `Sparse`."""
        return of_latent

    def sum_by_latent(self, values: Tensor) -> Tensor:
        """See `Sparse`."""
        return values.sum(0)

    def max_by_latent(self, values: Tensor) -> Tensor:
        """See `Sparse`."""
        return values.amax(0).clamp_min(0)

    def fired(self, acts: Tensor) -> Tensor:
        """See `Sparse`."""
        return (acts > 0).any(0).nonzero()[:, 0]

    def decode(self, acts: Tensor, W_dec: Tensor) -> Tensor:
        """See `Sparse`."""
        return torch.stack([acts[:, part] @ W_dec[part] for part in self.levels.slices()], dim=1)

    def product(self, table_bld: Tensor, directions_sd: Tensor) -> Tensor:
        """See `Sparse`."""
        parts = self._levels_of(table_bld)
        return torch.cat([table_bld[:, level] @ directions_sd[part].T for level, part in parts], dim=1)

    def gather(self, weights: Tensor, table_bld: Tensor, out_sd: Tensor) -> None:
        """See `Sparse`."""
        for level, part in self._levels_of(table_bld):
            torch.mm(weights[:, part].T, table_bld[:, level], out=out_sd[part])

    def _levels_of(self, table_bld: Tensor) -> list[tuple[int, slice]]:
        return [(0, slice(None))] if table_bld.shape[1] == 1 else list(enumerate(self.levels.slices()))


Entries = Sparse | Dense


def _gather_bags(rows: Tensor, weights: Tensor, table: Tensor, bounds: Tensor, out_sd: Tensor) -> None:
    """See `Sparse.gather`; entries are in the order of latents, of which each one's begin at its bound."""
    firsts = range(0, len(out_sd), LATENTS_PER_CHUNK)
    ends = bounds[[*firsts, len(out_sd)]].tolist()
    for i, first in enumerate(firsts):
        chunk, entries = slice(first, first + LATENTS_PER_CHUNK), slice(ends[i], ends[i + 1])
        starts = bounds[:-1][chunk] - ends[i]
        out_sd[chunk] = embedding_bag(rows[entries], table, starts, mode="sum", per_sample_weights=weights[entries])
