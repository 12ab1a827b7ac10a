"""k-means: centres of the data, and the dictionary in which one latent fires a token, that of its nearest centre."""

import torch
from torch import Tensor

ROUNDS = 256
"""Rounds in which the first centres are drawn; with at most so many centres each is drawn alone, as k-means++ does."""
MAX_STEPS = 20
"""Steps of Lloyd's algorithm."""
SETTLED = 0.01
"""It stops when fewer than this share of tokens change their centre: inertia then falls by less than a thousandth a step."""
ENTRIES = 2**23
"""Token-centre pairs whose distances are held at once."""


class KMeans:
    """acts are 1 for the nearest centre, else 0;  x̂ = acts centres, the centre itself (Lloyd 1982, vector quantisation)."""

    name = "kmeans"

    def __init__(self, centres: Tensor) -> None:
        self.centres = centres
        """(n_latents, d_model)"""

    @property
    def n_latents(self) -> int:
        """Centres."""
        return self.centres.shape[0]

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.centres.shape[1]

    def encode(self, x_bd: Tensor) -> Tensor:
        """One 1 a token: (batch, n_latents) of x (batch, d_model)."""
        nearest, _ = find_nearest(x_bd, self.centres)
        return x_bd.new_zeros(len(x_bd), self.n_latents).scatter_(1, nearest[:, None], 1.0)

    def decode(self, acts_bs: Tensor) -> Tensor:
        """The centres, (batch, d_model)."""
        return acts_bs @ self.centres


def find_centres(sample_nd: Tensor, n_centres: int, seed: int) -> Tensor:
    """Centres (n_centres, d_model) of `sample` (tokens, d_model), as many as tokens at most; the same for the same seed.

    Lloyd's algorithm from k-means++ (Arthur and Vassilvitskii 2007). Memory beside the sample: the centres four times, and ENTRIES.
    """
    centres = _draw_centres(sample_nd, min(n_centres, len(sample_nd)), torch.Generator().manual_seed(seed))
    before = torch.full((len(sample_nd),), -1, device=sample_nd.device)
    for _ in range(MAX_STEPS):
        nearest, distances = find_nearest(sample_nd, centres)
        centres = _move(sample_nd, nearest, distances, len(centres))
        if float((nearest != before).double().mean()) < SETTLED:
            break
        before = nearest
    return centres


def find_nearest(x_nd: Tensor, centres_sd: Tensor) -> tuple[Tensor, Tensor]:
    """Index of each token's nearest centre, and its squared distance, (tokens,) both."""
    middle = centres_sd.mean(0)  # both are shifted by it: ‖x‖² − 2 x·c + ‖c‖² loses its digits where all are far from zero
    W = (centres_sd - middle).T.contiguous()
    bias = -W.square().sum(0) / 2
    nearest = torch.empty(len(x_nd), dtype=torch.int64, device=x_nd.device)
    distances = torch.empty(len(x_nd), device=x_nd.device)
    n = max(1, ENTRIES // len(centres_sd))
    for start in range(0, len(x_nd), n):
        x = x_nd[start : start + n] - middle
        best = torch.addmm(bias, x, W).max(1)
        nearest[start : start + n] = best.indices
        distances[start : start + n] = (x.square().sum(1) - 2 * best.values).clamp_(min=0)
    return nearest, distances


def _draw_centres(sample_nd: Tensor, n_centres: int, generator: torch.Generator) -> Tensor:
    """Tokens, each with a chance that grows with its squared distance to those drawn in earlier rounds.

    4,096 rounds of one centre each would take longer than all of Lloyd's algorithm, which 256 rounds of 16 do not.
    """
    distances = torch.ones(len(sample_nd), device=sample_nd.device)
    chosen: list[Tensor] = []
    for some in torch.arange(n_centres).chunk(ROUNDS):
        # never quite zero: there may be fewer different tokens than centres
        chances = distances.cpu().clamp(min=1e-12)
        drawn = torch.multinomial(chances, len(some), generator=generator).to(sample_nd.device)
        _, to_these = find_nearest(sample_nd, sample_nd[drawn])
        distances = torch.minimum(distances, to_these) if chosen else to_these
        chosen.append(drawn)
    return sample_nd[torch.cat(chosen)]


def _move(sample_nd: Tensor, nearest: Tensor, distances: Tensor, n_centres: int) -> Tensor:
    """The mean of each centre's tokens; a centre without tokens moves to one of the tokens that are farthest from theirs."""
    counts = torch.bincount(nearest, minlength=n_centres)
    sums = sample_nd.new_zeros(n_centres, sample_nd.shape[1]).index_add_(0, nearest, sample_nd)
    centres = sums / counts.clamp(min=1)[:, None]
    is_empty = counts == 0
    centres[is_empty] = sample_nd[distances.topk(int(is_empty.sum())).indices]
    return centres
