"""Meanings of latents: the mean image on which each fires, in the model's joint image-text space.

The product of firings and embeddings is computed for one block of images after another, whose embeddings stay in a processor's
cache. Memory grows with the number of latents, but not with the number of images.
"""

from collections.abc import Iterator, Sequence

import duckdb
import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int

from ommatid import schemas
from ommatid.catalog.database import settings
from ommatid.catalog.vectors import pack
from ommatid.compute.nearest import slices
from ommatid.store import Artefact

BLOCK_BYTES = 2**24
"""Approximate size of the embeddings of a block of images."""
READ_ROWS = 4096
"""Number of embeddings read at once."""


def iter_meanings(activations: Artefact, images: Sequence[str], firings: Sequence[str], sae: str, d_sae: int) -> Iterator[pa.Table]:
    """Compute the meaning of each latent of an SAE that fires on an evaluation image.

    Embeddings are centred on their mean over the evaluation images and scaled to unit norm, as in `label`; a meaning is then the mean
    of the embeddings of a latent's firing images, weighted by its activation.

    Args:
        activations: Activations of a hookpoint, with the table `embeddings`.
        images: Files of the table `images`.
        firings: Files of the table `firings` of the SAE.
        sae: Name of the SAE.
        d_sae: Number of latents.

    Yields:
        Rows of `schemas.MEANINGS` for one tile of latents after another, in order; none if the model has no joint space.
    """
    from scipy.sparse import csr_array

    width = activations.summary.get("d_joint")
    if not width:
        return
    sums, n_images = np.zeros((d_sae, width), np.float32), np.zeros(d_sae, np.int32)
    with duckdb.connect(config=dict(settings())) as connection:
        evaluated = _evaluated(connection, images)
        mean = _mean(activations, evaluated, width)
        for numbers, joint in _iter_joint(activations, evaluated, width):
            centred = joint - mean
            centred /= np.linalg.norm(centred, axis=1, keepdims=True).clip(1e-12)
            image, latent, act = _fired(connection, firings, numbers)
            acts = csr_array((act, (latent, np.searchsorted(numbers, image))), shape=(d_sae, len(numbers)))
            acts.sort_indices()  # DuckDB returns rows in any order, and sums of floats depend on it
            n_images += np.diff(acts.indptr).astype(np.int32)
            for tile in slices(d_sae):
                sums[tile] += acts[tile] @ centred
    for tile in slices(d_sae):
        latents = tile.start + np.flatnonzero(n_images[tile])
        columns = {"sae": [sae] * len(latents), "latent": latents.astype(np.int32), "n_images": n_images[latents]}
        yield pa.table({**columns, "embedding": pack(sums[latents])}, schema=schemas.MEANINGS)


def _evaluated(connection: duckdb.DuckDBPyConnection, images: Sequence[str]) -> Int[np.ndarray, " images"]:
    """Numbers of the evaluation images, ascending."""
    sql = "SELECT image FROM read_parquet($images) WHERE split = 'eval' ORDER BY image"
    return np.asarray(connection.execute(sql, {"images": list(images)}).fetchnumpy()["image"])


def _mean(activations: Artefact, evaluated: Int[np.ndarray, " images"], width: int) -> Float32[np.ndarray, " d_joint"]:
    """Mean embedding of the evaluation images."""
    total = np.zeros(width)
    for _, joint in _iter_joint(activations, evaluated, width):
        total += joint.sum(axis=0, dtype=np.float64)
    return (total / max(1, len(evaluated))).astype(np.float32)


def _iter_joint(
    activations: Artefact, evaluated: Int[np.ndarray, " images"], width: int
) -> Iterator[tuple[Int[np.ndarray, " images"], Float32[np.ndarray, "images d_joint"]]]:
    """Iterate over the evaluation images in blocks: their numbers, ascending within a block, and their embeddings."""
    n = max(1, BLOCK_BYTES // (4 * width))
    numbers, joint = np.empty(0, np.int32), np.empty((0, width), np.float32)
    for batch in activations.iter_batches("embeddings", ["image", "joint"], n_rows=READ_ROWS):
        keep = np.isin(batch["image"].to_numpy(), evaluated, assume_unique=True)
        if not keep.any():
            continue
        kept = batch.filter(pa.array(keep))
        numbers, joint = np.r_[numbers, kept["image"].to_numpy()], np.r_[joint, _rows(kept["joint"], width)]
        if len(numbers) >= n:
            yield _in_order(numbers, joint)
            numbers, joint = numbers[:0], joint[:0]
    if len(numbers):
        yield _in_order(numbers, joint)


def _rows(column: pa.FixedSizeBinaryArray, width: int) -> Float32[np.ndarray, "rows d_joint"]:
    flat = np.frombuffer(column.buffers()[1], "<f4", count=len(column) * width, offset=column.offset * 4 * width)
    return flat.reshape(-1, width)


def _in_order(numbers: np.ndarray, joint: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(numbers)
    return numbers[order], joint[order]


def _fired(connection: duckdb.DuckDBPyConnection, firings: Sequence[str], numbers: Int[np.ndarray, " images"]) -> list[np.ndarray]:
    """Firings on some images, given by their ascending numbers: the image, latent and activation of each."""
    sql = "SELECT image, latent, act FROM read_parquet($files) WHERE image BETWEEN $first AND $last"
    values = {"files": list(firings), "first": int(numbers[0]), "last": int(numbers[-1])}
    found = connection.execute(sql, values).fetchnumpy()
    of_block = np.isin(found["image"], numbers)
    return [np.asarray(found[name])[of_block] for name in ("image", "latent", "act")]
