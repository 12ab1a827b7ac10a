"""Rows of activations and embeddings: spilled to the local disk, put in their final order, written as Parquet.

A shard's images each put their tokens in a random order; round r takes the r-th token of every image. Images are dealt to four
strata, which every round goes through in the same order, each shuffled anew. So two rows of one image are at least three quarters
of the shard's images apart, whatever the number of tokens: a batch holds as many different images as it has rows.
(A uniform shuffle of 2,048 rows over 7,000 images repeats 14 % of them.)

An image with fewer rows than there are rounds skips some, evenly, from a random one on: no round is left to a few images with many
rows. Then rows of one image are about `window` apart, which falls with the share of the image that has most; an image whose rows
come to a shard in several chunks is spread by each of them alone.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ommatid.activations.columns import from_float32, to_binary
from ommatid.activations.mmap import ONE_PAGE
from ommatid.extract.tokens import Place
from ommatid.schemas import judge_columns
from ommatid.store import File, Writer
from ommatid.store.filesystem import sync, writing
from ommatid.store.sums import block_sums

N_STRATA = 4


@dataclass(frozen=True)
class RowOrder:
    """Where each row of a chunk stands in its shard; sorts by round, stratum, draw."""

    round: np.ndarray
    """(rows,) int32: where all images have equally many rows, the how-manieth of its image."""
    stratum: np.ndarray
    """(rows,) int8: of its image."""
    draw: np.ndarray
    """(rows,) float64: the place within round and stratum."""

    def argsort(self) -> np.ndarray:
        """Indices that put the rows in order."""
        return np.lexsort((self.draw, self.stratum, self.round))


def order_rows(image: np.ndarray, rng: np.random.Generator, n_rounds: int | None = None) -> RowOrder:
    """Draw the order of a chunk's rows.

    Args:
        image: Image of each row, (rows,); an image's rows need not be adjacent.
        rng: Seeded by shard and chunk.
        n_rounds: Rounds of the shard, at least as many as rows of an image in the chunk; None: just so many.
    """
    _, member = np.unique(image, return_inverse=True)
    n_images = int(member.max(initial=-1)) + 1
    shuffled = rng.permutation(len(image))
    by_image = shuffled[np.argsort(member[shuffled], kind="stable")]
    counts = np.bincount(member, minlength=n_images)
    starts = counts.cumsum() - counts
    place = np.arange(len(image)) - starts.repeat(counts)
    n_rounds = n_rounds or int(counts.max(initial=1))
    round_ = np.empty(len(image), np.int32)
    round_[by_image] = (place * n_rounds + rng.integers(n_rounds, size=n_images).repeat(counts)) // counts.repeat(counts)
    stratum = (rng.permutation(n_images) % N_STRATA).astype(np.int8)
    return RowOrder(round_, stratum[member], rng.random(len(image)))


def window(rows_per_stratum: np.ndarray, most: int) -> int:
    """So many consecutive rows of a shard come from different images: a round but for the largest stratum.

    Args:
        rows_per_stratum: Rows of each.
        most: Rows of the image that has most. Where all have so many it is true of any consecutive rows, else about.
    """
    return int(rows_per_stratum.sum() - rows_per_stratum.max(initial=0)) // max(1, most)


BYTES_PER_ROW_GROUP = 2**25
"""Of the training table, about."""

_PARQUET: dict[str, Any] = {"compression": "none", "use_dictionary": ["token", "kind", "row", "col"], "write_statistics": False}


@dataclass(frozen=True)
class Groups:
    """How the rounds of a shard are divided into row groups."""

    n_rounds: int
    """Rounds of the shard: rows of the image that may have most."""
    rounds: int
    """Rounds in a row group."""

    @classmethod
    def of(cls, n_images: int, n_tokens: int, d_model: int, sample: int | None) -> "Groups":
        """Of a shard of so many images and kept tokens each."""
        return cls(min(n_tokens, sample or n_tokens), max(1, BYTES_PER_ROW_GROUP // (n_images * d_model * 2)))

    @property
    def n(self) -> int:
        """Row groups."""
        return -(-self.n_rounds // self.rounds)

    def split(self, image: np.ndarray, rng: np.random.Generator) -> tuple[RowOrder, list[np.ndarray]]:
        """The order of a chunk's rows, and for each row group which of them are in it, in that order.

        Args:
            image: Image of each row, (rows,).
            rng: Seeded by shard and chunk.
        """
        order = order_rows(image, rng, self.n_rounds)
        first = order.argsort()
        ends = np.searchsorted(order.round[first], (np.arange(self.n - 1) + 1) * self.rounds)
        return order, np.split(first, ends)


def embeddings_batch(numbers: np.ndarray, joint: Tensor, judges: Sequence[Tensor]) -> pa.RecordBatch:
    """One row an image."""
    vectors = {"joint": joint, **dict(zip(judge_columns(len(judges)), judges, strict=True))}
    columns = {name: to_binary(vector, torch.float32) for name, vector in vectors.items()}
    return pa.RecordBatch.from_pydict({"image": pa.array(numbers, pa.int32()), **columns})


def rows_batch(numbers: np.ndarray, tokens_btd: Tensor) -> pa.RecordBatch:
    """One row a token, in image and token order: image, place (index of the kept token) and x."""
    n, per_image = tokens_btd.shape[:2]
    columns = {
        "image": pa.array(numbers.repeat(per_image), pa.int32()),
        "place": pa.array(np.tile(np.arange(per_image), n), pa.int32()),
        "x": to_binary(tokens_btd.flatten(0, 1), torch.float16),
    }
    return pa.RecordBatch.from_pydict(columns)


def split_rounds(numbers: np.ndarray, tokens_btd: Tensor, kept_bt: np.ndarray, rng: np.random.Generator, groups: Groups) -> list[Any]:
    """The kept rows of a chunk as one record batch for each row group of the shard, with what puts them in order.

    Args:
        numbers: images.image, (images,).
        tokens_btd: Activations (images, tokens, d_model) float16.
        kept_bt: Which are kept, (images, tokens) bool.
        rng: Seeded by shard and chunk.
        groups: Of the shard.
    """
    image, place = kept_bt.nonzero()
    order, parts = groups.split(image, rng)
    flat = tokens_btd.flatten(0, 1)
    return [_ordered_batch(numbers, image, place, flat, order, rows) for rows in parts]


def _ordered_batch(
    numbers: np.ndarray, image: np.ndarray, place: np.ndarray, flat: Tensor, order: RowOrder, rows: np.ndarray
) -> pa.RecordBatch:
    n_tokens = len(flat) // max(1, len(numbers))
    columns = {
        "image": pa.array(numbers[image[rows]], pa.int32()),
        "place": pa.array(place[rows], pa.int32()),
        "round": pa.array(order.round[rows], pa.int32()),
        "stratum": pa.array(order.stratum[rows], pa.int8()),
        "draw": pa.array(order.draw[rows], pa.float64()),
        "x": to_binary(flat[torch.from_numpy(image[rows] * n_tokens + place[rows])], torch.float16),
    }
    return pa.RecordBatch.from_pydict(columns)


class Spill:
    """The folder of one shard's chunks. A chunk is there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sound: set[Path] = set()
        """Chunks that this process has found to be what was written."""
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, chunk: int) -> bool:
        """Whether this chunk was finished, now or by a run that died; one that was damaged since is removed, to be made again."""
        path = self._path(chunk)
        if path not in self._sound and path.exists():
            if _facts(path) == _noted(path):
                self._sound.add(path)
            else:
                shutil.rmtree(path)
        return path.exists()

    def write(self, chunk: int, tables: Mapping[str, list[pa.RecordBatch]]) -> None:
        """Write a chunk: batches of one schema under each name.

        Raises:
            ArtefactError: the disk is full, or may not be written to.
        """
        with writing(self._path(chunk)):
            self._write(chunk, tables)

    def _write(self, chunk: int, tables: Mapping[str, list[pa.RecordBatch]]) -> None:
        aside = self.folder / f"{chunk:05d}.{os.getpid()}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for name, batches in tables.items():
            with pa.ipc.new_file(str(aside / f"{name}.arrow"), batches[0].schema) as file:
                for batch in batches:
                    file.write_batch(batch)
            sync(aside / f"{name}.arrow")
        (aside / _NOTE).write_text(json.dumps(_facts(aside)), encoding="utf-8")
        sync(aside / _NOTE)
        if not self.has(chunk):
            aside.rename(self._path(chunk))

    def read(self, chunk: int, name: str, index: int = 0) -> pa.RecordBatch:
        """One of the batches under a name."""
        # read, not mapped: mapped pages would count as this process's memory
        with pa.OSFile(str(self._path(chunk) / f"{name}.arrow")) as file:
            return pa.ipc.open_file(file).get_batch(index)

    def drop(self) -> None:
        """Remove all chunks."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:05d}"


def iter_in_order(spill: Spill, name: str, n_chunks: int, n_groups: int) -> Iterator[pa.Table]:
    """The row groups of a shard, rows in their final order."""
    for group in range(n_groups):
        rows = pa.Table.from_batches([spill.read(chunk, name, group) for chunk in range(n_chunks)])
        yield rows.take(RowOrder(*(rows[column].to_numpy() for column in ("round", "stratum", "draw"))).argsort())


class Seen:
    """Counts the rows of each stratum and image while they pass by."""

    def __init__(self) -> None:
        self._strata = np.zeros(N_STRATA, np.int64)
        self._images: list[np.ndarray] = []

    def add(self, rows: pa.Table) -> pa.Table:
        """Look at some rows; gives them back."""
        self._strata += np.bincount(rows["stratum"].to_numpy(), minlength=N_STRATA)
        self._images.append(rows["image"].to_numpy())
        return rows

    @property
    def window(self) -> int:
        """So many consecutive rows come from different images."""
        images = np.concatenate(self._images)
        return window(self._strata, int(np.unique(images, return_counts=True)[1].max(initial=1)))


class Failed:
    """Counts the images that each judge failed on while their embeddings pass by."""

    def __init__(self, n_judges: int) -> None:
        self.counts = dict.fromkeys(judge_columns(n_judges), 0)
        """By column."""

    def add(self, rows: pa.Table) -> pa.Table:
        """Look at some embeddings; gives them back."""
        for name in self.counts:
            self.counts[name] += int(from_float32(rows[name]).isnan().all(1).sum())
        return rows


def activation_table(rows: pa.Table, places: Sequence[Place], schema: pa.Schema) -> pa.Table:
    """Rows of image, place and x in the schema of the artefact."""
    place = rows["place"]
    of_place = {field: pa.array([getattr(p, field) for p in places], schema.field(field).type) for field in ("token", "kind", "row", "col")}
    columns = {"image": rows["image"], "x": rows["x"], **{field: values.take(place.combine_chunks()) for field, values in of_place.items()}}
    return pa.table([columns[name] for name in schema.names], schema=schema)


def write_rows(writer: Writer, name: str, tables: Iterable[pa.Table], schema: pa.Schema) -> File:
    """One Parquet file, a row group a table; whole or not at all. Training rows can be mapped."""
    options = _PARQUET | (ONE_PAGE if "/train-" in f"/{name}" else {})
    with writer.write_file(name) as path, pq.ParquetWriter(path, schema, **options) as parquet:
        for table in tables:
            parquet.write_table(table.cast(schema), row_group_size=max(1, len(table)))
    return writer.describe(name)


_NOTE = "checksums.json"
"""File of a chunk that tells what the others hold."""


def _facts(chunk: Path) -> dict[str, str]:
    """Checksums of the files of a chunk."""
    found = {}
    for path in chunk.glob("*.arrow"):
        with path.open("rb") as file:
            found[path.name] = block_sums(file)
    return found


def _noted(chunk: Path) -> Any:
    try:
        return json.loads((chunk / _NOTE).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
