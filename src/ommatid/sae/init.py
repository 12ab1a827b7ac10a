"""How training begins: directions from data points, and an encoder of the right length."""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from ommatid.compute.hardware import product_dtype
from ommatid.sae.entries import Levels
from ommatid.sae.select import Scorer
from ommatid.sae.weights import Weights

DATAPOINT_BLEND = 0.8
"""Share of a data point in the initial direction, the rest random (saev)."""
TOKENS_OF_SCALE = 2048
"""On which the encoder's first length is fitted."""
ROWS_PER_CHUNK = 1024
"""Of directions, made at a time."""


def make_weights(d_sae: int, x_nd: Tensor, target_nd: Tensor | None, seed: int) -> Weights:
    """Datapoint init (saev): directions are a blend of centred data points and noise, W_enc their clone, b_dec the mean.

    Args:
        d_sae: Latents.
        x_nd: Scaled activations to draw from.
        target_nd: What is to be reconstructed of the same tokens, where that is another (a transcoder): W_dec is made of it.
        seed: Of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(x_nd), (d_sae,), generator=generator)
    noise = torch.randn(d_sae, x_nd.shape[1], generator=generator)
    W_enc = _directions(x_nd, chosen, noise)
    if target_nd is None:
        # .clone(): a view of W_dec would tie encoder and decoder together
        return Weights(W_enc.clone(), torch.zeros(d_sae), W_enc, x_nd.mean(0))
    noise = torch.randn(d_sae, target_nd.shape[1], generator=generator)
    W_dec = _directions(target_nd, chosen, noise)
    return Weights(W_enc, torch.zeros(d_sae), W_dec, target_nd.mean(0), fixed={"b_pre": x_nd.mean(0)})


def fit_scale(weights: Weights, x_nd: Tensor, k: int, target_nd: Tensor | None = None) -> None:
    """Scale the encoder so that x̂ of the k largest entries a token has the right length: by Σ x·x̂ / Σ ‖x̂‖² over some tokens.

    Directions that overlap add up: with encoder rows of unit length x̂ is several times too long, and FVU begins far above 1.

    Args:
        weights: W_enc is changed; b_enc is 0.
        x_nd: Scaled, centred activations.
        k: Latents that fire a token.
        target_nd: What is to be reconstructed of them, centred, where it is another.
    """
    x = x_nd[:TOKENS_OF_SCALE]
    target = x if target_nd is None else target_nd[:TOKENS_OF_SCALE]
    scorer = Scorer(weights, x, Levels((weights.d_sae,)), product_dtype(x.device))
    values, latents = scorer.largest(torch.arange(len(x)), min(k, weights.d_sae))
    x_hat = embedding_bag(latents, weights.W_dec, mode="sum", per_sample_weights=values.relu_())
    squares = float(x_hat.square().sum())
    along = float((target * x_hat).sum())
    if along > 0:
        weights.W_enc.mul_(along / squares)


def _directions(x_nd: Tensor, chosen: Tensor, noise: Tensor) -> Tensor:
    """In the memory of the noise: what large temporary tensors leave behind in the heap stays with the process."""
    mean = x_nd.mean(0)
    for own, points in zip(noise.split(ROWS_PER_CHUNK), chosen.split(ROWS_PER_CHUNK), strict=True):
        blend = DATAPOINT_BLEND * normalize(x_nd[points] - mean, dim=1) + (1 - DATAPOINT_BLEND) * normalize(own, dim=1)
        own.copy_(normalize(blend, dim=1))
    return noise
