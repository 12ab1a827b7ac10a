"""Intervals of statistics that need no arrays."""

import math

Z = 1.959964
"""Half the width of a 95 % interval, in standard errors."""


def spearman_interval(correlation: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a rank correlation over n pairs: tanh(atanh(ρ) ± 1.96 √((1 + ρ²/2) / (n − 3))).

    Source: Bonett and Wright 2000. Both ends are NaN for fewer than four pairs, and for a correlation that is NaN.
    """
    if n < 4 or math.isnan(correlation):
        return math.nan, math.nan
    centre = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, correlation)))
    half = Z * math.sqrt((1 + correlation**2 / 2) / (n - 3))
    return math.tanh(centre - half), math.tanh(centre + half)
