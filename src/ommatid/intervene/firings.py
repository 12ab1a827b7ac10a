"""Firings of latents on sampled tokens, from which the scale of each and the tokens on which it fires follow.

Suffixes: n firings, t tokens, d width of the tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32, Int32
from torch import Tensor

from ommatid.compute.nonzero import true_at
from ommatid.sae.model import SAE

ENTRIES = 2**24
"""Number of activations (tokens x latents) that are computed at a time; they take 64 MB."""
MOST = 2**24
"""Number of firings after which no further tokens are encoded, as a dictionary that is not sparse would fill the memory."""
QUANTILE = 0.99
"""Quantile of a latent's positive activations that is its scale."""


@dataclass(frozen=True, eq=False)
class Firings:
    """Firings of latents on some tokens, by latent."""

    n_tokens: int
    """Number of tokens that were encoded: all, or as many as have about `MOST` firings."""
    places: Mapping[int, slice]
    """Places of each latent's firings."""
    tokens_n: Int32[Tensor, " firings"]
    """Token of each firing, `(n,)`."""
    acts_n: Float32[Tensor, " firings"]
    """Activation of each firing, `(n,)`, ascending within a latent."""

    def count(self, latent: int) -> int:
        """Return the number of tokens on which a latent fires."""
        return self.places[latent].stop - self.places[latent].start

    def tokens(self, latent: int) -> Int32[Tensor, " firings"]:
        """Return the tokens on which a latent fires, `(n,)`."""
        return self.tokens_n[self.places[latent]]

    def most(self, latent: int) -> float:
        """Return a latent's largest activation; 0 if it fires on no token."""
        return float(self.acts_n[self.places[latent].stop - 1]) if self.count(latent) else 0.0

    def scale(self, latent: int) -> float:
        """Return the 99th percentile of a latent's positive activations, interpolated; NaN if it fires on no token."""
        if not (n := self.count(latent)):
            return math.nan
        place, acts = QUANTILE * (n - 1), self.acts_n[self.places[latent]]
        low, high = float(acts[math.floor(place)]), float(acts[math.ceil(place)])
        return low + (place - math.floor(place)) * (high - low)


def find_firings(sae: SAE, x_td: Float32[Tensor, "tokens d_model"], latents: Sequence[int] | None = None) -> Firings:
    """Encode tokens, `(tokens, d_model)`, and sort the firings by latent; of some latents, or of all."""
    chosen = range(sae.n_latents) if latents is None else latents
    tokens, columns, acts, start, width = [], [], [], 0, len(chosen)
    for rows in x_td.split(max(1, ENTRIES // sae.n_latents)):
        of_rows = sae.encode(rows) if latents is None else sae.encode_latents(rows, torch.tensor(list(latents)))
        at = true_at(of_rows > 0)
        tokens.append((start + at // width).int())
        columns.append((at % width).int())
        acts.append(of_rows.flatten()[at])
        start += len(rows)
        if sum(map(len, acts)) >= MOST:
            break
    columns_n, acts_n = torch.cat(columns), torch.cat(acts)
    ascending = acts_n.argsort(stable=True)
    order = ascending[columns_n[ascending].argsort(stable=True)]
    ends = torch.bincount(columns_n, minlength=width).cumsum(0).tolist()
    places = {latent: slice(begin, end) for latent, begin, end in zip(chosen, [0, *ends[:-1]], ends, strict=True)}
    return Firings(start, places, torch.cat(tokens)[order], acts_n[order])
