"""Directions of an SAE's latents, and the nearest latents by their cosine, in tiles so that memory does not grow with their number."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors import safe_open

from ommatid import schemas
from ommatid.catalog.vectors import pack
from ommatid.compute.nearest import UnitRows, iter_nearest, slices

WEIGHTS = "sae.safetensors"
"""File written by `ommatid.sae.model`, which is not imported here because it needs torch."""


def iter_neighbours(folder: Path, sae: str, n: int) -> Iterator[pa.Table]:
    """Find the nearest latents of each latent of an SAE.

    Args:
        folder: Folder with the SAE's weights.
        sae: Name of the SAE.
        n: Number of neighbours per latent.

    Yields:
        Rows of `schemas.NEIGHBOURS` for one tile of latents after another, in order.
    """
    with _open_directions(folder) as directions:
        d_sae, start = len(directions), 0
        for found in iter_nearest(directions, directions, min(n, d_sae - 1), np.arange(d_sae)):
            yield _table(sae, start, found.others.astype(np.int32), found.cosines)
            start += len(found.others)


def iter_directions(folder: Path, sae: str) -> Iterator[pa.Table]:
    """Read the directions of an SAE from its weights.

    Args:
        folder: Folder with the SAE's weights.
        sae: Name of the SAE.

    Yields:
        Rows of `schemas.DIRECTIONS` for one tile of latents after another, in order.
    """
    with _open_directions(folder) as directions:
        for tile in slices(len(directions)):
            latents = np.arange(tile.start, tile.stop, dtype=np.int32)
            columns = {"sae": [sae] * len(latents), "latent": latents, "direction": pack(directions[tile])}
            yield pa.table(columns, schema=schemas.DIRECTIONS)


@contextmanager
def _open_directions(folder: Path) -> Iterator[UnitRows]:
    """Provide the directions in the weights in a folder, `(d_sae, d_model)`, at unit norm."""
    with safe_open(folder / WEIGHTS, framework="numpy") as file:
        weights = file.get_slice("W_dec")
        yield UnitRows(weights.get_shape()[0], lambda rows: weights[rows])


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
