"""Nearest latents by the cosine of their directions, computed in tiles so that memory does not grow with the number of latents."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors import safe_open

from ommatid import schemas
from ommatid.compute.largest import largest

WEIGHTS = "sae.safetensors"
"""File written by `ommatid.sae.model`, which is not imported here because it needs torch."""
TILE = 4096
"""Number of directions on each side of a tile, whose cosines take 64 MB."""


def iter_neighbours(folder: Path, sae: str, n: int) -> Iterator[pa.Table]:
    """Find the nearest latents of each latent of an SAE.

    Args:
        folder: Folder with the SAE's weights.
        sae: Name of the SAE.
        n: Number of neighbours per latent.

    Yields:
        Rows of `schemas.NEIGHBOURS` for one tile of latents after another, in order.
    """
    with safe_open(folder / WEIGHTS, framework="numpy") as file:
        directions = file.get_slice("W_dec")
        d_sae = directions.get_shape()[0]

        def tile_at(start: int) -> np.ndarray:
            return _unit(directions[start : min(start + TILE, d_sae)])

        for start in range(0, d_sae, TILE):
            yield _table(sae, start, *_nearest(tile_at, start, d_sae, min(n, d_sae - 1)))


def _nearest(tile_at: Callable[[int], np.ndarray], start: int, d_sae: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest latents and their cosines, each (tile, n) and nearest first, for the tile of latents at `start`."""
    queries = tile_at(start)
    others = np.empty((len(queries), 0), np.int32)
    cosines = np.empty((len(queries), 0), np.float32)
    for at in range(0, d_sae, TILE):
        tile = queries @ tile_at(at).T
        if at == start:
            np.fill_diagonal(tile, -np.inf)
        found = largest(tile, n)
        others = np.concatenate([others, found.astype(np.int32) + at], axis=1)
        cosines = np.concatenate([cosines, np.take_along_axis(tile, found, axis=1)], axis=1)
        keep = largest(cosines, n)
        others, cosines = np.take_along_axis(others, keep, axis=1), np.take_along_axis(cosines, keep, axis=1)
    return others, cosines


def _unit(rows: np.ndarray) -> np.ndarray:
    """Scale rows to unit norm, as imported directions may have other norms; a row of zeros stays as it is."""
    rows = rows.astype(np.float32, copy=False)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def _table(sae: str, start: int, others: np.ndarray, cosines: np.ndarray) -> pa.Table:
    n_latents, n = others.shape
    columns = {
        "sae": np.full(n_latents * n, sae),
        "latent": np.repeat(np.arange(start, start + n_latents, dtype=np.int32), n),
        "rank": np.tile(np.arange(1, n + 1, dtype=np.int32), n_latents),
        "other": others.ravel(),
        "cosine": cosines.ravel(),
    }
    return pa.table(columns, schema=schemas.NEIGHBOURS)
