"""Does a latent show what no other shows."""

import math

import torch
from torch import Tensor

LATENTS_PER_STEP = 256
"""Whose overlaps with all others are counted at once."""


def uniqueness(images_sn: Tensor) -> Tensor:
    """1 − largest Jaccard of a latent's set of strongest images with that of any other latent, (latents,) float64.

    1: it shares none of them with another; 0: another has the very same.

    Args:
        images_sn: The n strongest images of each latent, (latents, n) int64, -1 where there are fewer. A latent with fewer has no
            uniqueness (NaN) and is no other's partner: among sets of one or two images equal ones are chance.
    """
    n_latents, n = images_sn.shape
    found = torch.full((n_latents,), math.nan, dtype=torch.float64)
    full = (images_sn >= 0).all(1).nonzero()[:, 0]
    sets = images_sn[full]
    for start in range(0, len(full), LATENTS_PER_STEP):
        chosen = torch.arange(start, min(start + LATENTS_PER_STEP, len(full)))
        overlap = _overlaps(sets, chosen)
        overlap[chosen, torch.arange(len(chosen))] = 0  # with itself
        most = overlap.amax(0).double()
        found[full[chosen]] = 1 - most / (2 * n - most)
    return found


def _overlaps(sets_sn: Tensor, chosen: Tensor) -> Tensor:
    """How many images each latent has in common with each chosen one, (latents, chosen) float32."""
    images = sets_sn[chosen].unique()
    place = torch.searchsorted(images, sets_sn).clamp_max(len(images) - 1)
    place[images[place] != sets_sn] = len(images)  # a row of zeros for images that no chosen latent has
    is_in = torch.zeros(len(images) + 1, len(chosen))
    is_in[place[chosen].flatten(), torch.arange(len(chosen)).repeat_interleave(sets_sn.shape[1])] = 1
    return torch.nn.functional.embedding_bag(place, is_in, mode="sum")
