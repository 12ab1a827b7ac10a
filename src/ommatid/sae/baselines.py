"""Baseline dictionaries for comparison with an SAE, behind one protocol. k-means and NMF have files of their own.

Each baseline is fitted on a float32 sample of training tokens, `(tokens, d_model)`. The same sample and seed give the same baseline.
"""

from typing import Protocol, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from ommatid.config import Baseline
from ommatid.sae.kmeans import KMeans, find_centres
from ommatid.sae.model import SAE, SAEConfig
from ommatid.sae.nmf import fit_nmf

ROWS = 8192
"""Number of tokens that are standardised, or converted to float64, at a time."""


class Dictionary(Protocol):
    """A dictionary of latents, with which tokens are encoded and decoded: the interface that an SAE shares with its baselines."""

    @property
    def name(self) -> str:
        """Name of the method, such as pca."""
        ...

    @property
    def n_latents(self) -> int:
        """Number of latents."""
        ...

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        ...

    def encode(self, x_bd: Float[Tensor, "batch d_model={self.d_model}"]) -> Float[Tensor, "batch n_latents={self.n_latents}"]:
        """Return the latent activations `(batch, n_latents)` of x `(batch, d_model)`. Only those of raw neurons may be negative."""
        ...

    def decode(self, acts_bs: Float[Tensor, "batch n_latents={self.n_latents}"]) -> Float[Tensor, "batch d_out"]:
        """Return the reconstruction x̂ `(batch, d_out)` of acts `(batch, n_latents)`."""
        ...


class Neurons:
    """Raw neurons: each dimension of the activations is a latent, so acts = x̂ = x."""

    name = "neurons"

    def __init__(self, d_model: int) -> None:
        self.d_model = d_model
        self.n_latents = d_model

    def encode(self, x_bd: Float[Tensor, "batch d_model={self.d_model}"]) -> Float[Tensor, "batch n_latents={self.n_latents}"]:
        """Return x itself, `(batch, d_model)`."""
        return x_bd

    def decode(self, acts_bs: Float[Tensor, "batch n_latents={self.n_latents}"]) -> Float[Tensor, "batch d_out"]:
        """Return acts themselves, `(batch, d_model)`."""
        return acts_bs


def make_baseline(kind: Baseline, config: SAEConfig, sample_nd: Float[Tensor, "tokens d_model"], seed: int) -> Dictionary:
    """Fit a baseline with as many latents, and as many firings per token, as an SAE has, where the method allows it.

    Args:
        kind: Kind of the baseline.
        config: Configuration of the SAE.
        sample_nd: Training tokens, `(tokens, d_model)`.
        seed: Seed of random draws.

    Returns:
        The fitted dictionary.
    """
    match kind:
        case "sparse_neurons":
            return make_sparse_neurons(config, sample_nd)
        case "pca":
            return make_pca(config, sample_nd)
        case "kmeans":
            return KMeans(find_centres(sample_nd, config.d_sae, seed))
        case "nmf":
            return fit_nmf(sample_nd, config.d_sae, config.k, seed)
        case _:
            assert_never(kind)


def make_sparse_neurons(config: SAEConfig, sample_nd: Float[Tensor, "tokens d_model"]) -> SAE:
    """Make an SAE of raw neurons as sparse as the SAE's latents, which shows how much monosemanticity comes from sparsity alone.

    Each dimension, standardised by its mean and standard deviation, gives two latents, one for each sign. All latents share one threshold,
    chosen so that a latent fires, on average, on k / d_sae of the tokens.

    Args:
        config: Configuration of the SAE.
        sample_nd: Training tokens, `(tokens, d_model)`. The first `ROWS` determine the threshold.

    Returns:
        The sparse neurons, as an SAE with 2 · d_model latents.
    """
    d_model = sample_nd.shape[1]
    mean, std = sample_nd.mean(0), sample_nd.std(0).clamp_min(1e-12)
    z = (sample_nd[:ROWS] - mean) / std
    n_firings = max(1, round(config.k / config.d_sae * 2 * z.numel()))
    threshold = z.abs().flatten().kthvalue(max(1, z.numel() - n_firings)).values if n_firings < z.numel() else torch.zeros(())
    eye = torch.eye(d_model)
    directions = torch.cat([eye * std, -eye * std])
    W_enc = torch.cat([eye / std, -eye / std])
    k = max(1, round(n_firings / len(z)))
    sparse = SAEConfig("sparse_neurons", d_model, 2 * d_model, k, config.hookpoint, config.model)
    return SAE(sparse, W_enc.T.contiguous(), -(W_enc @ mean), directions, mean, threshold)


def make_pca(config: SAEConfig, sample_nd: Float[Tensor, "tokens d_model"]) -> SAE:
    """Make an SAE whose directions are the principal components and their opposites; the k largest latents of a token fire.

    There are 2 · min(d_model, d_sae / 2) latents, two per component, and the components with the largest variance come first. Only one
    sign of a component can fire on a token. If k is at least the number of components, none is cut off, and x̂ is the projection of x onto
    the components (Jolliffe 2002), which is x itself if there are d_model of them.

    Args:
        config: Configuration of the SAE.
        sample_nd: Training tokens, `(tokens, d_model)`.

    Returns:
        The SAE.
    """
    d_model = sample_nd.shape[1]
    rank = min(d_model, config.d_sae // 2)
    mean = sum((x.double().sum(0) for x in sample_nd.split(ROWS)), torch.zeros(())) / len(sample_nd)
    covariance = sum(((x - mean).T @ (x - mean) for x in sample_nd.split(ROWS)), torch.zeros(()))
    components = torch.linalg.eigh(covariance).eigenvectors.T.flip(0)[:rank]
    directions = torch.cat([components, -components])
    pca = SAEConfig("pca", d_model, 2 * rank, min(config.k, rank), config.hookpoint, config.model, activation="topk")
    W_enc, b_enc, W_dec, b_dec = (t.float().contiguous() for t in (directions.T, -(directions @ mean), directions, mean))
    return SAE(pca, W_enc, b_enc, W_dec, b_dec, torch.zeros((), device=sample_nd.device))
