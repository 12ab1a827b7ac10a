"""What several metrics need of vectors."""

import torch
from torch import Tensor


def unit(x_bd: Tensor) -> Tensor:
    """Rows scaled to unit norm, in float64."""
    return x_bd / row_norms(x_bd)


def row_norms(x_bd: Tensor) -> Tensor:
    """Lengths of rows, (rows, 1) float64; those of rows of zeros are such that one can divide by them."""
    return torch.linalg.vector_norm(x_bd.double(), dim=1, keepdim=True).clamp_min(1e-12)


def nan_mean(x: Tensor) -> float:
    """Mean of what is not NaN; NaN if nothing is."""
    return float(x.nanmean())
