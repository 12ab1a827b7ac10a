"""Directions and meanings of latents as the catalogue stores them: the direction of a vector, in one byte per coordinate."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Float32

if TYPE_CHECKING:
    import pyarrow as pa

STEPS = 127
"""Stored value of the largest coordinate of a vector. A cosine with a stored vector is off by less than 0.001."""


def pack(vectors: Float[np.ndarray, "rows d"]) -> "pa.Array":
    """Return vectors as binary values of `d` signed bytes each, scaled so that the largest coordinate is `STEPS`; zeros stay zeros."""
    import pyarrow as pa  # here, as the explorer only unpacks, and its memory need not hold pyarrow

    largest = np.abs(vectors).max(axis=1, keepdims=True)
    stored = np.rint(vectors * (STEPS / np.where(largest > 0, largest, 1))).astype(np.int8)
    n, d = stored.shape
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(d), n, [None, pa.py_buffer(stored)]).cast(pa.binary())


def unpack(blobs: Sequence[bytes]) -> Float32[np.ndarray, "rows d"]:
    """Return vectors that `pack` stored, all of the same width, as rows of unit norm, `(rows, d)` float32; zeros stay zeros."""
    rows = np.frombuffer(b"".join(blobs), np.int8).reshape(len(blobs), len(blobs[0]) if blobs else 0).astype(np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows /= np.where(norms > 0, norms, 1)
    return rows
