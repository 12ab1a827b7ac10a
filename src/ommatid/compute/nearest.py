"""Nearest directions by cosine, in tiles, so that memory does not grow with the number of directions.

Matrices of directions are arrays of numpy or tensors of torch, which is not imported here: each product is computed by the library
that the matrix comes from. What is largest is decided in one way for all of them: of equal values the lower index comes first.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

ALIKE = 0.9
"""Cosine above which two directions are taken for the same."""
TILE = 4096
"""Directions on a side of a tile, whose cosines take 64 MB."""


@dataclass(frozen=True)
class Nearest:
    """Nearest directions of each query, the nearest first."""

    others: np.ndarray
    """Indices of the directions, (queries, n) int64."""
    cosines: np.ndarray
    """Their cosines, (queries, n) float32; minus infinity where the direction was not allowed."""


def iter_nearest(
    queries: Any, directions: Any, n: int, own: np.ndarray | None = None, allowed: np.ndarray | None = None
) -> Iterator[Nearest]:
    """Yield the nearest directions of `TILE` queries at a time, in order.

    Args:
        queries: Unit rows (queries, d): an array, a tensor, or anything else that has a length and yields such rows when it is sliced.
        directions: Unit rows (directions, d), as `queries`.
        n: Number of directions for each query; all of them at most.
        own: The index of each query among the directions, (queries,), which is not allowed; None if queries are not directions.
        allowed: Whether each pair counts, (queries, directions) bool; None allows all.
    """
    for rows in _slices(len(queries)):
        block = queries[rows]
        best = _Best(len(block), n)
        for columns in _slices(len(directions)):
            cosines = _product(block, directions[columns])
            if own is not None:
                mine = own[rows] - columns.start
                inside = np.flatnonzero((mine >= 0) & (mine < cosines.shape[1]))
                cosines[inside, mine[inside]] = -np.inf
            if allowed is not None:
                cosines[~allowed[rows, columns]] = -np.inf
            best.add(columns.start, cosines)
        yield best.found


def nearest(queries: Any, directions: Any, n: int, own: np.ndarray | None = None, allowed: np.ndarray | None = None) -> Nearest:
    """Return the nearest directions of all queries; see `iter_nearest`."""
    return _joined(list(iter_nearest(queries, directions, n, own, allowed)))


def nearest_both_ways(a: Any, b: Any) -> tuple[Nearest, Nearest]:
    """Return the nearest of `b` for each row of `a`, and the nearest of `a` for each of `b`, from one product; at least a row each."""
    there, back = [], [_Best(columns.stop - columns.start, 1) for columns in _slices(len(b))]
    for rows in _slices(len(a)):
        block = a[rows]
        best = _Best(len(block), 1)
        for columns, other in zip(_slices(len(b)), back, strict=True):
            cosines = _product(block, b[columns])
            best.add(columns.start, cosines)
            other.add(rows.start, cosines.T)
        there.append(best.found)
    return _joined(there), _joined([best.found for best in back])


class UnitRows:
    """Rows of a matrix, read a slice at a time, and scaled to unit length in float32; rows of zeros stay zeros."""

    def __init__(self, n: int, read: Callable[[slice], np.ndarray]) -> None:
        self._n = n
        self._read = read

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, rows: slice) -> np.ndarray:
        found = self._read(rows).astype(np.float32, copy=False)
        norms = np.linalg.norm(found, axis=1, keepdims=True)
        return found / np.where(norms > 0, norms, 1)


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
    if n == 1:
        return values.argmax(axis=1, keepdims=True)
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


class _Best:
    """The nearest directions of some queries among the tiles so far."""

    def __init__(self, n_queries: int, n: int) -> None:
        self._n = n
        self.found = Nearest(np.empty((n_queries, 0), np.int64), np.empty((n_queries, 0), np.float32))

    def add(self, first: int, cosines: np.ndarray) -> None:
        """Take in the cosines (queries, columns) of directions from `first` on, which come after all those before."""
        new = largest(cosines, self._n)
        others = np.concatenate([self.found.others, new + first], axis=1)
        values = np.concatenate([self.found.cosines, np.take_along_axis(cosines, new, axis=1)], axis=1)
        keep = largest(values, self._n)
        self.found = Nearest(np.take_along_axis(others, keep, axis=1), np.take_along_axis(values, keep, axis=1))


def _product(queries: Any, directions: Any) -> np.ndarray:
    """Cosines of unit rows, (queries, directions)."""
    return np.asarray(queries @ directions.T)


def _joined(found: list[Nearest]) -> Nearest:
    return Nearest(np.concatenate([one.others for one in found]), np.concatenate([one.cosines for one in found]))


def _slices(n: int) -> Iterator[slice]:
    return (slice(start, min(start + TILE, n)) for start in range(0, n, TILE))
