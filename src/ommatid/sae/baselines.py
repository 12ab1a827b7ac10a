"""Baselines: the dictionaries that an SAE is compared with, behind one protocol. k-means and NMF have files of their own.

Each is fitted on a sample of training tokens (tokens, d_model) float32, and is the same for the same sample and seed.
"""

from typing import Protocol, assert_never

import torch
from torch import Tensor

from ommatid.config import Baseline
from ommatid.sae.kmeans import KMeans, find_centres
from ommatid.sae.model import SAE, SAEConfig
from ommatid.sae.nmf import fit_nmf

ROWS = 8192
"""Tokens that are held in float64 at once."""


class Dictionary(Protocol):
    """Latents that tokens are encoded to and decoded from: what an SAE has in common with its baselines."""

    @property
    def name(self) -> str:
        """What it is, such as pca."""
        ...

    @property
    def n_latents(self) -> int:
        """Latents."""
        ...

    @property
    def d_model(self) -> int:
        """Width of the activations that are encoded."""
        ...

    def encode(self, x_bd: Tensor) -> Tensor:
        """Latent activations (batch, n_latents) of x (batch, d_model), >= 0 but for raw neurons, which keep their signs."""
        ...

    def decode(self, acts_bs: Tensor) -> Tensor:
        """Reconstruction x̂ of acts (batch, n_latents)."""
        ...


class Neurons:
    """acts = x̂ = x: each dimension of the activations is a latent."""

    name = "neurons"

    def __init__(self, d_model: int) -> None:
        self.d_model = d_model
        self.n_latents = d_model

    def encode(self, x_bd: Tensor) -> Tensor:
        """X itself, (batch, d_model)."""
        return x_bd

    def decode(self, acts_bs: Tensor) -> Tensor:
        """Acts themselves, (batch, d_model)."""
        return acts_bs


def make_baseline(kind: Baseline, config: SAEConfig, sample_nd: Tensor, seed: int) -> Dictionary:
    """The baseline of an SAE, with as many latents and firings a token where it can have as many."""
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


def make_sparse_neurons(config: SAEConfig, sample_nd: Tensor) -> SAE:
    """The raw neurons, each as often silent as a latent of the SAE: what of an SAE's monosemanticity is sparsity alone.

    Each dimension and its opposite, in units of its standard deviation from its mean, is a latent that fires above one threshold for all,
    at which a latent fires on k / d_sae of the sample's tokens.
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


def make_pca(config: SAEConfig, sample_nd: Tensor) -> SAE:
    """Principal components as an SAE whose directions are the components and their opposites: the k largest of a token fire.

    Of each component one sign fires, so 2 · min(d_model, d_sae / 2) latents, the components with the largest variance first. Where k
    is no less than their number nothing is cut off, and x̂ is the projection on them (Jolliffe 2002), for d_model of them x itself.
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
