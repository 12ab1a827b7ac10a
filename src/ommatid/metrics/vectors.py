"""Operations on vectors that several metrics share."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def unit(x_bd: Float[Tensor, "rows d"]) -> Float64[Tensor, "rows d"]:
    """Return rows scaled to unit norm, in float64."""
    return x_bd / row_norms(x_bd)


def row_norms(x_bd: Float[Tensor, "rows d"]) -> Float64[Tensor, "rows 1"]:
    """Return the norms of rows, `(rows, 1)` float64, with a lower bound of 1e-12 that makes them safe to divide by."""
    return torch.linalg.vector_norm(x_bd.double(), dim=1, keepdim=True).clamp_min(1e-12)


def nan_mean(x: Float[Tensor, "..."]) -> float:
    """Return the mean of the values that are not NaN, or NaN if there are none."""
    return float(x.nanmean())
