"""Histograms of a dictionary in training: how often its latents fire, how long their encoders are, their biases."""

import torch
from torch import Tensor

from ommatid.sae.weights import Weights

BINS = 24
"""Of each."""

Histogram = tuple[list[float], list[int]]
"""Edges and counts, one edge more than counts."""


def histograms(weights: Weights, density: Tensor) -> dict[str, Histogram]:
    """Of all latents, by name; of the densities those that are not 0.

    Args:
        weights: Of the dictionary.
        density: Firings a token of each latent, (d_sae,).
    """
    found = {
        "log10_density": density[density > 0].double().log10(),
        "encoder_norm": weights.W_enc.norm(dim=1).double(),
        "encoder_bias": weights.b_enc.double(),
    }
    return {name: histogram(values.cpu()) for name, values in found.items() if len(values)}


def histogram(values: Tensor) -> Histogram:
    """Of values, (n,), in `BINS` bins from the smallest to the largest."""
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(values, BINS, low, high) if high > low else torch.zeros(BINS)
    if high <= low:
        counts[0] = len(values)
    return torch.linspace(low, high, BINS + 1).tolist(), [int(n) for n in counts.tolist()]
