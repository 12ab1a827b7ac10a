"""Choice of some of many, spread evenly over all."""

import numpy as np
from jaxtyping import Int64


def spread_evenly(n: int, at_most: int) -> Int64[np.ndarray, " chosen"]:
    """Return up to `at_most` of the indices 0 to n - 1, evenly spaced and ascending, the first and the last among them if there are two."""
    return np.linspace(0, n - 1, min(n, at_most)).round().astype(np.int64)
