"""Rows of activations and embeddings: as they wait in the spill, in their final order, and in Parquet."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ommatid.extract.shuffle import N_STRATA, RowOrder, order_rows, window
from ommatid.extract.spill import Spill
from ommatid.extract.tokens import Place
from ommatid.mapped import ONE_PAGE
from ommatid.schemas import judge_columns
from ommatid.store import File, Writer
from ommatid.tensors import from_float32, to_binary

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
