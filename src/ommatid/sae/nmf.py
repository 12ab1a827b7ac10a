"""NMF: non-negative parts of the data, and the dictionary that makes each token of at most k of them."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

BLEND = 0.8
"""Share of a token in each first part, the rest noise."""
STEPS = 256
"""Updates of the parts."""
BATCH = 1024
"""Tokens of an update of the parts."""
FORGET = 0.7
"""What is left of a batch's weight after a pass over the sample (scikit-learn's MiniBatchNMF)."""
ROUNDS = 8
"""Rounds in which the parts of a token are chosen, k / 8 each."""
SWEEPS = 2
"""HALS sweeps over a token's parts after each round."""
LAST_SWEEPS = 20
"""HALS sweeps over a token's parts when all are there: with 10 one in 6,000 is over 2 % above the best (12 dimensions, to 8 parts)."""
ENTRIES = 2**24
"""Values of chosen parts (tokens x k x d_model), or of activations (tokens x n_latents), held at once."""


class NMF:
    """acts = argmin ‖x₊ − acts W‖² with acts >= 0 and at most k of them positive a token;  x̂ = acts W + low;  x₊ = max(x − low, 0).

    W >= 0. Activations are not: low, the minimum of each dimension over the sample, is subtracted first.

    A token's parts are chosen by non-negative orthogonal matching pursuit: in each of eight rounds the k / 8 parts that are most
    alike to what is left join them (as in generalised OMP, Wang, Kwon and Shim 2012), and all their acts are solved anew by sweeps of
    HALS (hierarchical alternating least squares: Cichocki et al. 2007), a fixed number. So L0 is about the SAE's. Without the limit
    the parts would say nothing: with d_model of them NMF is exact whatever the data, each dimension a part.
    """

    name = "nmf"

    def __init__(self, W: Tensor, low: Tensor, k: int) -> None:
        self.W = W
        """(n_latents, d_model), >= 0, rows of unit norm"""
        self.low = low
        """(d_model,)"""
        self.k = k
        """Parts a token has at most."""

    @property
    def n_latents(self) -> int:
        """Parts."""
        return self.W.shape[0]

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return self.W.shape[1]

    def encode(self, x_bd: Tensor) -> Tensor:
        """Activations (batch, n_latents) of x (batch, d_model)."""
        rows = x_bd.split(max(1, ENTRIES // max(self.k * self.d_model, self.n_latents)))
        return torch.cat([_solve((x - self.low).relu_(), self.W, self.k) for x in rows])

    def decode(self, acts_bs: Tensor) -> Tensor:
        """Reconstruction (batch, d_model) of acts (batch, n_latents)."""
        return torch.addmm(self.low, acts_bs, self.W)


def fit_nmf(sample_nd: Tensor, n_latents: int, k: int, seed: int) -> NMF:
    """Parts of `sample` (tokens, d_model), as many as tokens at most; the same for the same seed.

    NMF with at most k parts a token (Peharz and Pernkopf 2012, Neurocomputing 80) in mini-batches whose weights fade (online
    dictionary learning: Mairal et al. 2010, with the diagonal of its matrix). Memory beside the sample: the parts thrice, ENTRIES.
    """
    generator = torch.Generator().manual_seed(seed)
    low = sample_nd.amin(0)
    n_latents = min(n_latents, len(sample_nd))
    nmf = NMF(_draw_parts(sample_nd, low, n_latents, generator), low, min(k, n_latents))
    weight = low.new_zeros(n_latents)
    for _ in range(STEPS):
        rows = torch.randint(len(sample_nd), (min(BATCH, len(sample_nd)),), generator=generator)
        weight *= FORGET ** (len(rows) / len(sample_nd))
        _improve(nmf, sample_nd[rows.to(low.device)], weight)
    return nmf


def _improve(nmf: NMF, x_bd: Tensor, weight_s: Tensor) -> None:
    """Move each part towards its best value for the batch given the others, by the batch's share in `weight`, which grows.

    Multiplicative updates need 15 times the seconds for the same error. But all parts move at once, and where they overlap that
    goes too far: the step is the best one along the direction, 1 at most.
    """
    acts = nmf.encode(x_bd)
    left = x_bd - nmf.decode(acts)
    weight_s += acts.square().sum(0)
    move = (acts.T @ left) / weight_s.clamp(min=1e-12)[:, None]
    change = acts @ move
    step = (left * change).sum() / change.square().sum().clamp(min=1e-12)
    nmf.W.add_(move * step.clamp(max=1)).relu_()
    normalize(nmf.W, dim=1, out=nmf.W)


def _draw_parts(sample_nd: Tensor, low: Tensor, n_latents: int, generator: torch.Generator) -> Tensor:
    """Tokens blended with noise, so that no two parts are equal where tokens are."""
    chosen = torch.randperm(len(sample_nd), generator=generator)[:n_latents]
    noise = torch.rand(n_latents, sample_nd.shape[1], generator=generator)
    points, noise = normalize(sample_nd[chosen.to(low.device)] - low, dim=1), normalize(noise, dim=1).to(low.device)
    return normalize(BLEND * points + (1 - BLEND) * noise, dim=1)


def _solve(x_bd: Tensor, W: Tensor, k: int) -> Tensor:
    """The acts (batch, n_latents) of non-negative x, dense."""
    n = len(x_bd)
    chosen = torch.empty(n, k, dtype=torch.int64, device=x_bd.device)
    parts = x_bd.new_empty(n, k, x_bd.shape[1])
    gram, target, acts = x_bd.new_empty(n, k, k), x_bd.new_empty(n, k), x_bd.new_zeros(n, k)
    left, n_chosen = x_bd, 0
    for some in torch.arange(k).chunk(ROUNDS):
        new, n_chosen = slice(n_chosen, n_chosen + len(some)), n_chosen + len(some)
        chosen[:, new] = (left @ W.T).scatter_(1, chosen[:, : new.start], -torch.inf).topk(len(some)).indices
        parts[:, new] = W[chosen[:, new]]
        gram[:, new, :n_chosen] = torch.bmm(parts[:, new], parts[:, :n_chosen].mT)
        gram[:, :n_chosen, new] = gram[:, new, :n_chosen].mT
        target[:, new] = torch.bmm(parts[:, new], x_bd[:, :, None])[:, :, 0]
        _sweep(acts, gram, target, n_chosen, SWEEPS)
        left = x_bd - torch.bmm(acts[:, None, :n_chosen], parts[:, :n_chosen])[:, 0]
    _sweep(acts, gram, target, k, LAST_SWEEPS)
    return x_bd.new_zeros(n, len(W)).scatter_(1, chosen, acts)


def _sweep(acts_bk: Tensor, gram_bkk: Tensor, target_bk: Tensor, n: int, n_sweeps: int) -> None:
    """Set each of the first n acts in turn to the best non-negative value given the others; parts are of unit norm."""
    for j in list(range(n)) * n_sweeps:
        gradient = torch.linalg.vecdot(gram_bkk[:, j, :n], acts_bk[:, :n]) - target_bk[:, j]
        acts_bk[:, j] = (acts_bk[:, j] - gradient).relu_()
