"""Initial weights: directions made from data points, and an encoder scaled so that reconstructions fit their targets."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag, normalize

from ommatid.compute.hardware import product_dtype
from ommatid.sae.entries import Levels
from ommatid.sae.select import Scorer
from ommatid.sae.weights import Weights

DATAPOINT_BLEND = 0.8
"""Weight of the data point in an initial direction; the rest is noise (saev)."""
TOKENS_OF_SCALE = 2048
"""Number of tokens on which the scale of the encoder is fitted."""
ROWS_PER_CHUNK = 1024
"""Number of directions computed at a time."""


def make_weights(d_sae: int, x_nd: Float[Tensor, "tokens d_model"], target_nd: Float[Tensor, "tokens d_out"] | None, seed: int) -> Weights:
    """Initialise from data points (saev): directions blend centred data points with noise, W_enc copies them, and b_dec is the mean.

    Args:
        d_sae: Number of latents.
        x_nd: Scaled activations from which data points are drawn, `(tokens, d_model)`.
        target_nd: Scaled activations that a transcoder reconstructs for the same tokens, `(tokens, d_out)`: W_dec is made from these.
            None for an autoencoder.
        seed: Seed of the random choice of data points and of the noise.

    Returns:
        The weights, with b_enc 0. Those of a transcoder also hold the mean of `x_nd`, as `b_pre`.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(x_nd), (d_sae,), generator=generator)
    noise = torch.randn(d_sae, x_nd.shape[1], generator=generator)
    W_enc = _directions(x_nd, chosen, noise)
    if target_nd is None:
        # Cloned because a view of W_dec would tie the encoder to the decoder.
        return Weights(W_enc.clone(), torch.zeros(d_sae), W_enc, x_nd.mean(0))
    noise = torch.randn(d_sae, target_nd.shape[1], generator=generator)
    W_dec = _directions(target_nd, chosen, noise)
    return Weights(W_enc, torch.zeros(d_sae), W_dec, target_nd.mean(0), fixed={"b_pre": x_nd.mean(0)})


def fit_scale(
    weights: Weights, x_nd: Float[Tensor, "tokens d_model"], k: int, target_nd: Float[Tensor, "tokens d_out"] | None = None
) -> None:
    """Scale the encoder so that x̂, reconstructed from the k largest latents of each token, fits the target in the least-squares sense.

    The factor is Σ target·x̂ / Σ ‖x̂‖² over the first `TOKENS_OF_SCALE` tokens. Without it, x̂ would be several times too long and FVU
    would begin far above 1, because directions overlap and their contributions add up.

    Args:
        weights: Weights with b_enc 0; W_enc is scaled in place.
        x_nd: Scaled, centred activations, `(tokens, d_model)`.
        k: Number of latents that fire per token.
        target_nd: Centred activations that a transcoder reconstructs, `(tokens, d_out)`. None for an autoencoder.
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


def _directions(
    x_nd: Float[Tensor, "tokens d_model"], chosen: Int[Tensor, " d_sae"], noise: Float[Tensor, "d_sae d_model"]
) -> Float[Tensor, "d_sae d_model"]:
    """Blend noise with data points into directions, in place: the heap memory of large temporary tensors is not returned to the system."""
    mean = x_nd.mean(0)
    for rows, points in zip(noise.split(ROWS_PER_CHUNK), chosen.split(ROWS_PER_CHUNK), strict=True):
        blend = DATAPOINT_BLEND * normalize(x_nd[points] - mean, dim=1) + (1 - DATAPOINT_BLEND) * normalize(rows, dim=1)
        rows.copy_(normalize(blend, dim=1))
    return noise
