"""What several metrics need of vectors."""

import torch
from torch import Tensor


def unit(x_bd: Tensor) -> Tensor:
    """Rows scaled to unit norm, in float64."""
    return torch.nn.functional.normalize(x_bd.double(), dim=1)


def nan_mean(x: Tensor) -> float:
    """Mean of what is not NaN; NaN if nothing is."""
    return float(x.nanmean())
