"""Which images a latent is named by, and which ones its name is tested on: never the same.

The evaluation split is cut in two by hash of the image id. The naming half makes the name and the detection threshold; the
held-out half scores it: firing images against images that do not fire, half of them random, half of them hard (they fire the
latents whose directions are nearest).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np

from ommatid.store import Artefact

MAX_FIRING = 64
"""Firing images drawn for a test, from all strengths."""
N_HARD_LATENTS = 8
"""Nearest latents whose images serve as hard negatives."""


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


@dataclass(frozen=True)
class Test:
    """Rows on which a name is tried, all of one half, in an order that has nothing to do with their activations."""

    positive: np.ndarray
    """Rows that fire the latent."""
    acts: np.ndarray
    """Image-level activation of each of them."""
    hard: np.ndarray
    """Rows that do not, but fire the latents with the nearest directions."""
    random: np.ndarray
    """Other rows that do not."""

    @property
    def negative(self) -> np.ndarray:
        """All rows that do not fire it."""
        return np.concatenate([self.hard, self.random])

    @property
    def rows(self) -> np.ndarray:
        """All of them."""
        return np.concatenate([self.positive, self.negative])


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


def iter_fired(evaluation: Artefact, halves: Halves, temp: str) -> Iterator[Fired]:
    """The latents that fire, in order; DuckDB sorts outside memory where it must."""
    settings: dict[str, Any] = {"memory_limit": "1GB", "temp_directory": temp, "preserve_insertion_order": "false"}
    files = [str(path) for path in evaluation.files("firings")]
    with duckdb.connect(config=settings) as connection:
        sql = "SELECT latent, image, act FROM read_parquet($files) ORDER BY latent, act DESC, image"
        rest = np.empty((0, 3))
        for batch in connection.execute(sql, {"files": files}).to_arrow_reader(2**16):
            columns = [batch[name].to_numpy().astype(np.float64) for name in ("latent", "image", "act")]
            rows = np.concatenate([rest, np.stack(columns, axis=1)])
            *whole, rest = np.split(rows, np.flatnonzero(np.diff(rows[:, 0])) + 1)
            yield from (_fired(rows, halves) for rows in whole)
        if len(rest):
            yield _fired(rest, halves)


def draw_test(fired: Fired, halves: Halves, held_out: bool, neighbours: Sequence[np.ndarray], rng: np.random.Generator) -> Test:
    """Firing images of one half and as many that do not fire; `neighbours` are rows that fire the nearest latents."""
    drawn = rng.permutation(np.flatnonzero(halves.is_held_out[fired.rows] == held_out))[:MAX_FIRING]
    hard, random = draw_silent(fired, halves, held_out, neighbours, len(drawn), rng)
    return Test(fired.rows[drawn], fired.acts[drawn], hard, random)


def draw_silent(
    fired: Fired, halves: Halves, held_out: bool, neighbours: Sequence[np.ndarray], n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """At most n rows of one half that do not fire: up to half of them fire the nearest latents, the others are random."""
    silent = halves.is_held_out == held_out
    silent[fired.rows] = False
    near = np.unique(np.concatenate([np.empty(0, dtype=np.int64), *neighbours]))
    hard = rng.permutation(near[silent[near]])[: n // 2]
    silent[hard] = False
    return hard, rng.permutation(np.flatnonzero(silent))[: n - len(hard)]


def _fired(rows: np.ndarray, halves: Halves) -> Fired:
    return Fired(int(rows[0, 0]), halves.rows_of(rows[:, 1].astype(np.int64)), rows[:, 2])
