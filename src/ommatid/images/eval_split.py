"""The evaluation images, divided into two halves, and the firings of each latent on them.

Labels and probes are made on one half and scored on the other, the held-out half. A hash of the image id decides which half an image is in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from jaxtyping import Bool, Float, Int, Int64

from ommatid.store import Artefact


@dataclass(frozen=True)
class EvalSplit:
    """The evaluation images, one per row of the matrices of embeddings, and the half that each is in."""

    images: Int64[np.ndarray, " rows"]
    """Number of each row's image, ascending, (rows,)."""
    is_held_out: Bool[np.ndarray, " rows"]
    """Whether the row is in the held-out half, (rows,) bool."""

    def rows_of(self, images: np.ndarray) -> np.ndarray:
        """Return the rows of images, given their numbers."""
        return np.searchsorted(self.images, images)


@dataclass(frozen=True)
class LatentFirings:
    """All evaluation images on which one latent fires, in order of decreasing activation."""

    latent: int
    """Index of the latent."""
    rows: Int[np.ndarray, " firings"]
    """Rows of the images in `EvalSplit`, (firings,)."""
    acts: Float[np.ndarray, " firings"]
    """Activation of the latent on each image, (firings,)."""


def load_eval_split(images: Artefact) -> EvalSplit:
    """Load the evaluation images, halved by the second 32 bits of the image id; the first 32 decide between train and eval."""
    numbers, held_out = [], []
    for batch in images.iter_batches("images", ["image", "image_id", "split"], n_rows=4096):
        rows = zip(*(batch[name].to_pylist() for name in ("image", "image_id", "split")), strict=True)
        for image, image_id, split in rows:
            if split == "eval":
                numbers.append(image)
                held_out.append(int(image_id[8:16], 16) % 2 == 1)
    return EvalSplit(np.array(numbers, dtype=np.int64), np.array(held_out, dtype=bool))


def iter_latent_firings(files: Sequence[Path | str], split: EvalSplit, temp: str) -> Iterator[LatentFirings]:
    """Iterate over the latents that fire at all, in order.

    Args:
        files: The parts of a table `firings`.
        split: The evaluation images.
        temp: Folder into which DuckDB spills what does not fit into memory.

    Yields:
        The firings of one latent.
    """
    settings: dict[str, Any] = {"memory_limit": "1GB", "temp_directory": temp, "preserve_insertion_order": "false"}
    with duckdb.connect(config=settings) as connection:
        sql = "SELECT latent, image, act FROM read_parquet($files) ORDER BY latent, act DESC, image"
        rest = np.empty((0, 3))
        for batch in connection.execute(sql, {"files": [str(path) for path in files]}).to_arrow_reader(2**16):
            columns = [batch[name].to_numpy().astype(np.float64) for name in ("latent", "image", "act")]
            rows = np.concatenate([rest, np.stack(columns, axis=1)])
            *whole, rest = np.split(rows, np.flatnonzero(np.diff(rows[:, 0])) + 1)
            yield from (_firings_of(rows, split) for rows in whole)
        if len(rest):
            yield _firings_of(rest, split)


def _firings_of(rows: np.ndarray, split: EvalSplit) -> LatentFirings:
    return LatentFirings(int(rows[0, 0]), split.rows_of(rows[:, 1].astype(np.int64)), rows[:, 2])
