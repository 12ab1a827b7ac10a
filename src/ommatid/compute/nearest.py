"""Nearest directions by cosine, computed in tiles, so that memory does not grow with the number of directions.

Directions are numpy arrays or torch tensors. torch is not imported here: each product is computed by the library of its operands. Ties are
always resolved in the same way: of equal values, the one with the lower index comes first.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Int64

ALIKE = 0.9
"""Cosine above which two directions count as the same."""
TILE = 4096
"""Number of directions per side of a tile of cosines, which then takes 64 MB."""


@dataclass(frozen=True)
class Nearest:
    """The nearest directions of each query, nearest first."""

    others: Int64[np.ndarray, "queries n"]
    """Indices of the directions, `(queries, n)` int64."""
    cosines: Float[np.ndarray, "queries n"]
    """Cosines with the directions, `(queries, n)` float32; minus infinity for a direction that was not allowed."""


def iter_nearest(
    queries: Any,
    directions: Any,
    n: int,
    own: Int[np.ndarray, " queries"] | None = None,
    allowed: Bool[np.ndarray, "queries directions"] | None = None,
) -> Iterator[Nearest]:
    """Yield the nearest directions of `TILE` queries at a time, in order.

    Args:
        queries: Rows of unit norm, `(queries, d)`: an array, a tensor, or any object that has a length and returns such rows when sliced.
        directions: Rows of unit norm, `(directions, d)`, in the same form.
        n: Number of directions per query, or all of them if there are fewer.
        own: Index of each query among the directions, `(queries,)`, so that it is not found as its own neighbour; None if queries are
            not directions.
        allowed: Whether each pair is allowed, `(queries, directions)` bool; None allows all.

    Yields:
        The nearest directions of up to `TILE` queries.
    """
    for rows in slices(len(queries)):
        block = queries[rows]
        best = _Best(len(block), n)
        for columns in slices(len(directions)):
            cosines = _product(block, directions[columns])
            if own is not None:
                own_columns = own[rows] - columns.start
                inside = np.flatnonzero((own_columns >= 0) & (own_columns < cosines.shape[1]))
                cosines[inside, own_columns[inside]] = -np.inf
            if allowed is not None:
                cosines[~allowed[rows, columns]] = -np.inf
            best.add(columns.start, cosines)
        yield best.found


def nearest(
    queries: Any,
    directions: Any,
    n: int,
    own: Int[np.ndarray, " queries"] | None = None,
    allowed: Bool[np.ndarray, "queries directions"] | None = None,
) -> Nearest:
    """Return the nearest directions of all queries: see `iter_nearest`."""
    return _joined(list(iter_nearest(queries, directions, n, own, allowed)))


def nearest_both_ways(a: Any, b: Any) -> tuple[Nearest, Nearest]:
    """Return the nearest row of `b` for each row of `a`, and the reverse, from one product. Both must have at least one row."""
    there, back = [], [_Best(columns.stop - columns.start, 1) for columns in slices(len(b))]
    for rows in slices(len(a)):
        block = a[rows]
        best = _Best(len(block), 1)
        for columns, other in zip(slices(len(b)), back, strict=True):
            cosines = _product(block, b[columns])
            best.add(columns.start, cosines)
            other.add(rows.start, cosines.T)
        there.append(best.found)
    return _joined(there), _joined([best.found for best in back])


class UnitRows:
    """A matrix that is read in slices of rows, which are scaled to unit norm in float32. Rows of zeros stay zero."""

    def __init__(self, n: int, read: Callable[[slice], np.ndarray]) -> None:
        self._n = n
        self._read = read

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, rows: slice) -> np.ndarray:
        found = self._read(rows).astype(np.float32, copy=False)
        norms = np.linalg.norm(found, axis=1, keepdims=True)
        return found / np.where(norms > 0, norms, 1)


def largest(values: Float[np.ndarray, "rows columns"], n: int) -> Int64[np.ndarray, "rows kept"]:
    """Return the columns of each row's `n` largest values, largest first. Of equal values, the one in the lower column comes first.

    Args:
        values: Values without NaN, `(rows, columns)`.
        n: Number of values to select.

    Returns:
        The columns, `(rows, min(n, columns))` int64.
    """
    n = min(n, values.shape[1])
    if not n:
        return np.empty((len(values), 0), np.int64)
    if n == 1:
        return values.argmax(axis=1, keepdims=True)
    found = np.argpartition(-values, n - 1, axis=1)[:, :n]
    kept = np.take_along_axis(values, found, axis=1)
    least = kept.min(axis=1, keepdims=True)
    # Among the values that equal the smallest one selected, argpartition selects arbitrarily.
    for row in np.flatnonzero((values == least).sum(1) > (kept == least).sum(1)):
        above = np.flatnonzero(values[row] > least[row])
        found[row] = np.concatenate([above, np.flatnonzero(values[row] == least[row])[: n - len(above)]])
    found.sort(axis=1)
    order = np.argsort(-np.take_along_axis(values, found, axis=1), axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1)


class _Best:
    """The nearest directions of some queries in the tiles added so far."""

    def __init__(self, n_queries: int, n: int) -> None:
        self._n = n
        self.found = Nearest(np.empty((n_queries, 0), np.int64), np.empty((n_queries, 0), np.float32))

    def add(self, first: int, cosines: np.ndarray) -> None:
        """Add cosines `(queries, columns)` with the directions from index `first` on. Tiles must be added in ascending order."""
        new = largest(cosines, self._n)
        others = np.concatenate([self.found.others, new + first], axis=1)
        values = np.concatenate([self.found.cosines, np.take_along_axis(cosines, new, axis=1)], axis=1)
        keep = largest(values, self._n)
        self.found = Nearest(np.take_along_axis(others, keep, axis=1), np.take_along_axis(values, keep, axis=1))


def _product(queries: Any, directions: Any) -> np.ndarray:
    """Return the cosines of rows of unit norm, `(queries, directions)`."""
    return np.asarray(queries @ directions.T)


def _joined(found: list[Nearest]) -> Nearest:
    return Nearest(np.concatenate([one.others for one in found]), np.concatenate([one.cosines for one in found]))


def slices(n: int) -> Iterator[slice]:
    """Return the tiles of n directions, in order."""
    return (slice(start, min(start + TILE, n)) for start in range(0, n, TILE))
