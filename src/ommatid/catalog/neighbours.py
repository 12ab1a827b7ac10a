"""Nearest latents by the cosine of their directions, computed in tiles so that memory does not grow with the number of latents."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors import safe_open

from ommatid import schemas
from ommatid.compute.nearest import UnitRows, iter_nearest

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
    with safe_open(folder / WEIGHTS, framework="numpy") as file:
        weights = file.get_slice("W_dec")
        d_sae = weights.get_shape()[0]
        directions = UnitRows(d_sae, lambda rows: weights[rows])
        start = 0
        for found in iter_nearest(directions, directions, min(n, d_sae - 1), np.arange(d_sae)):
            yield _table(sae, start, found.others.astype(np.int32), found.cosines)
            start += len(found.others)


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
