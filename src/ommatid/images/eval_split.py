"""The evaluation images, cut in two, and the firings of each latent on them.

The cut is by hash of the image id: one half makes what the other one tests (names, probes).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from ommatid.store import Artefact


@dataclass(frozen=True)
class Halves:
    """Evaluation images by row: their place in the embedding matrix is their row here."""

    images: np.ndarray
    """images.image of each row, ascending."""
    is_held_out: np.ndarray
    """Whether the row belongs to the half that scores."""

    def rows_of(self, images: np.ndarray) -> np.ndarray:
        """Rows of image numbers."""
        return np.searchsorted(self.images, images)


@dataclass(frozen=True)
class Fired:
    """All images that fire one latent, strongest first."""

    latent: int
    rows: np.ndarray
    """Rows of `Halves`."""
    acts: np.ndarray


def load_halves(images: Artefact) -> Halves:
    """Cut the evaluation split by the second 32 bits of the image id (the first made the split)."""
    numbers, held_out = [], []
    for batch in images.iter_batches("images", ["image", "image_id", "split"], n_rows=4096):
        rows = zip(*(batch[name].to_pylist() for name in ("image", "image_id", "split")), strict=True)
        for image, image_id, split in rows:
            if split == "eval":
                numbers.append(image)
                held_out.append(int(image_id[8:16], 16) % 2 == 1)
    return Halves(np.array(numbers, dtype=np.int64), np.array(held_out, dtype=bool))


def iter_fired(files: Sequence[Path | str], halves: Halves, temp: str) -> Iterator[Fired]:
    """The latents that fire, in order, from the parts of a table `firings`; DuckDB sorts in the folder `temp` what memory does not hold."""
    settings: dict[str, Any] = {"memory_limit": "1GB", "temp_directory": temp, "preserve_insertion_order": "false"}
    with duckdb.connect(config=settings) as connection:
        sql = "SELECT latent, image, act FROM read_parquet($files) ORDER BY latent, act DESC, image"
        rest = np.empty((0, 3))
        for batch in connection.execute(sql, {"files": [str(path) for path in files]}).to_arrow_reader(2**16):
            columns = [batch[name].to_numpy().astype(np.float64) for name in ("latent", "image", "act")]
            rows = np.concatenate([rest, np.stack(columns, axis=1)])
            *whole, rest = np.split(rows, np.flatnonzero(np.diff(rows[:, 0])) + 1)
            yield from (_fired(rows, halves) for rows in whole)
        if len(rest):
            yield _fired(rest, halves)


def _fired(rows: np.ndarray, halves: Halves) -> Fired:
    return Fired(int(rows[0, 0]), halves.rows_of(rows[:, 1].astype(np.int64)), rows[:, 2])
