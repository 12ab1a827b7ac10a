"""The largest values of each row, by a rule that leaves nothing to the library that sorts."""

import numpy as np


def largest(values: np.ndarray, n: int) -> np.ndarray:
    """Columns of each row's `n` largest values, largest first; of equal values the lower column comes first, and is kept where one must go.

    Args:
        values: (rows, columns), without NaN.
        n: How many, all of them at most.

    Returns:
        (rows, min(n, columns)) int64.
    """
    n = min(n, values.shape[1])
    if not n:
        return np.empty((len(values), 0), np.int64)
    found = np.argpartition(-values, n - 1, axis=1)[:, :n]
    kept = np.take_along_axis(values, found, axis=1)
    least = kept.min(axis=1, keepdims=True)
    # of values that equal the last one kept, argpartition takes any
    for row in np.flatnonzero((values == least).sum(1) > (kept == least).sum(1)):
        above = np.flatnonzero(values[row] > least[row])
        found[row] = np.concatenate([above, np.flatnonzero(values[row] == least[row])[: n - len(above)]])
    found.sort(axis=1)
    order = np.argsort(-np.take_along_axis(values, found, axis=1), axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1)
