"""k-means as a dictionary: each centre is a latent, and on each token only the latent of the nearest centre fires."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

ROUNDS = 256
"""Number of rounds in which the initial centres are drawn. Up to this number of centres, each round draws one, as in k-means++."""
MAX_STEPS = 20
"""Largest number of steps of Lloyd's algorithm."""
SETTLED = 0.01
"""Share of tokens that change their centre below which Lloyd's algorithm stops; inertia then falls by less than 0.1 % per step."""
ENTRIES = 2**23
"""Number of distances between tokens and centres held in memory at a time."""


class KMeans:
    """A k-means dictionary: acts are 1 for the nearest centre, else 0; x̂ = acts · centres, the centre itself (Lloyd 1982)."""

    name = "kmeans"

    def __init__(self, centres: Float[Tensor, "n_latents d_model"]) -> None:
        self.centres = centres
        """Centres, `(n_latents, d_model)`."""

    @property
    def n_latents(self) -> int:
        """Number of centres."""
        return self.centres.shape[0]

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.centres.shape[1]

    def encode(self, x_bd: Float[Tensor, "batch d_model={self.d_model}"]) -> Float[Tensor, "batch n_latents={self.n_latents}"]:
        """Return the one-hot activations `(batch, n_latents)` of x `(batch, d_model)`."""
        nearest, _ = find_nearest(x_bd, self.centres)
        return x_bd.new_zeros(len(x_bd), self.n_latents).scatter_(1, nearest[:, None], 1.0)

    def decode(self, acts_bs: Float[Tensor, "batch n_latents={self.n_latents}"]) -> Float[Tensor, "batch d_model"]:
        """Return the centre of each token, `(batch, d_model)`, from acts `(batch, n_latents)`."""
        return acts_bs @ self.centres


def find_centres(sample_nd: Float[Tensor, "tokens d_model"], n_centres: int, seed: int) -> Float[Tensor, "centres d_model"]:
    """Cluster tokens with Lloyd's algorithm, initialised by k-means++ (Arthur and Vassilvitskii 2007).

    Besides the sample, memory is needed for four copies of the centres and for `ENTRIES` distances.

    Args:
        sample_nd: Tokens, `(tokens, d_model)`.
        n_centres: Number of centres. If there are fewer tokens, there is one centre per token.
        seed: Seed of the initial draw. The same sample and seed give the same centres.

    Returns:
        The centres, `(centres, d_model)`.
    """
    centres = _draw_centres(sample_nd, min(n_centres, len(sample_nd)), torch.Generator().manual_seed(seed))
    previous = torch.full((len(sample_nd),), -1, device=sample_nd.device)
    for _ in range(MAX_STEPS):
        nearest, distances = find_nearest(sample_nd, centres)
        centres = _move(sample_nd, nearest, distances, len(centres))
        if float((nearest != previous).double().mean()) < SETTLED:
            break
        previous = nearest
    return centres


def find_nearest(
    x_nd: Float[Tensor, "tokens d_model"], centres_sd: Float[Tensor, "centres d_model"]
) -> tuple[Int[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """Return the index of each token's nearest centre and the squared distance to it, `(tokens,)` each."""
    # Tokens and centres are shifted by the mean centre: ‖x‖² − 2 x·c + ‖c‖² loses precision far from the origin.
    middle = centres_sd.mean(0)
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


def _draw_centres(
    sample_nd: Float[Tensor, "tokens d_model"], n_centres: int, generator: torch.Generator
) -> Float[Tensor, "centres d_model"]:
    """Draw tokens as initial centres, with probability proportional to the squared distance to the centres of earlier rounds.

    Drawing several centres per round saves time: 4,096 rounds of one centre take longer than the whole of Lloyd's algorithm, whereas 256
    rounds of 16 do not.
    """
    distances = torch.ones(len(sample_nd), device=sample_nd.device)
    chosen: list[Tensor] = []
    for group in torch.arange(n_centres).chunk(ROUNDS):
        # Clamped above zero because there may be fewer distinct tokens than centres.
        chances = distances.cpu().clamp(min=1e-12)
        drawn = torch.multinomial(chances, len(group), generator=generator).to(sample_nd.device)
        _, to_drawn = find_nearest(sample_nd, sample_nd[drawn])
        distances = torch.minimum(distances, to_drawn) if chosen else to_drawn
        chosen.append(drawn)
    return sample_nd[torch.cat(chosen)]


def _move(
    sample_nd: Float[Tensor, "tokens d_model"], nearest: Int[Tensor, " tokens"], distances: Float[Tensor, " tokens"], n_centres: int
) -> Float[Tensor, "centres d_model"]:
    """Move each centre to the mean of its tokens, and a centre without tokens to one of the tokens farthest from their own centres."""
    counts = torch.bincount(nearest, minlength=n_centres)
    sums = sample_nd.new_zeros(n_centres, sample_nd.shape[1]).index_add_(0, nearest, sample_nd)
    centres = sums / counts.clamp(min=1)[:, None]
    is_empty = counts == 0
    centres[is_empty] = sample_nd[distances.topk(int(is_empty.sum())).indices]
    return centres
