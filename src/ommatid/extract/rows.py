"""Rows of activations and embeddings: they are spilled to the local disk, put in their final order, and written as Parquet.

The tokens of each image are put in a random order, and round r of a shard takes the r-th token of every image. Images are dealt to four
strata. Every round goes through the strata in the same order, and reshuffles each stratum. Two rows of one image are therefore at least
three quarters of the shard's images apart, whatever the number of tokens, and every row of a batch comes from a different image. (In a
uniform shuffle of 2,048 rows over 7,000 images, 14 % of the rows would repeat an image.)

An image with fewer rows than there are rounds skips rounds evenly, beginning at a random one, so that no round is left to the few images
with many rows. Rows of one image are then about `window` rows apart; the window shrinks as the share of rows from the largest image grows.
If the rows of an image reach a shard in several chunks, each chunk spreads them independently.
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
from jaxtyping import Bool, Float, Float64, Int, Int8, Int32, Int64
from torch import Tensor

from ommatid.activations.columns import from_float32, to_binary
from ommatid.activations.mmap import ONE_PAGE
from ommatid.extract.tokens import Place
from ommatid.schemas import judge_columns
from ommatid.store import File, Writer
from ommatid.store.filesystem import sync, writing
from ommatid.store.sums import block_sums

N_STRATA = 4
"""Number of strata that a shard's images are dealt to."""


@dataclass(frozen=True)
class RowOrder:
    """Sort keys that place each row of a chunk in its shard: round, then stratum, then draw."""

    round: Int32[np.ndarray, " rows"]
    """Round of each row, `(rows,)` int32: the index of the row within its image if all images have equally many rows."""
    stratum: Int8[np.ndarray, " rows"]
    """Stratum of each row's image, `(rows,)` int8."""
    draw: Float64[np.ndarray, " rows"]
    """Random number that orders rows within a round and stratum, `(rows,)` float64."""

    def argsort(self) -> Int64[np.ndarray, " rows"]:
        """Return the indices that put the rows in order, `(rows,)`."""
        return np.lexsort((self.draw, self.stratum, self.round))


def order_rows(image: Int[np.ndarray, " rows"], rng: np.random.Generator, n_rounds: int | None = None) -> RowOrder:
    """Draw the order of a chunk's rows.

    Args:
        image: Image of each row, `(rows,)`. The rows of an image need not be adjacent.
        rng: Generator seeded by shard and chunk.
        n_rounds: Number of rounds of the shard, at least the largest number of rows that an image has in the chunk; None means exactly
            that number.

    Returns:
        The sort keys of the rows.
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


def window(rows_per_stratum: Int[np.ndarray, " strata"], most: int) -> int:
    """Return the number of consecutive rows of a shard that come from different images: a round without its largest stratum.

    Args:
        rows_per_stratum: Number of rows in each stratum, `(strata,)`.
        most: Largest number of rows from one image. The result is exact if all images have that many, and approximate otherwise.

    Returns:
        The number of rows.
    """
    return int(rows_per_stratum.sum() - rows_per_stratum.max(initial=0)) // max(1, most)


BYTES_PER_ROW_GROUP = 2**25
"""Approximate bytes per row group of the training table."""

_PARQUET: dict[str, Any] = {"compression": "none", "use_dictionary": ["token", "kind", "row", "col"], "write_statistics": False}


@dataclass(frozen=True)
class Groups:
    """The division of a shard's rounds into row groups."""

    n_rounds: int
    """Number of rounds of the shard: the largest number of rows that an image can have."""
    rounds: int
    """Number of rounds per row group."""

    @classmethod
    def of(cls, n_images: int, n_tokens: int, d_model: int, sample: int | None) -> "Groups":
        """Divide the rounds of a shard into row groups.

        Args:
            n_images: Number of images in the shard.
            n_tokens: Number of tokens kept per image before sampling.
            d_model: Width of an activation.
            sample: `extract.sample`, the number of tokens drawn per image; None means all.

        Returns:
            The division into row groups of about `BYTES_PER_ROW_GROUP` bytes.
        """
        return cls(min(n_tokens, sample or n_tokens), max(1, BYTES_PER_ROW_GROUP // (n_images * d_model * 2)))

    @property
    def n(self) -> int:
        """Number of row groups."""
        return -(-self.n_rounds // self.rounds)

    def split(self, image: np.ndarray, rng: np.random.Generator) -> tuple[RowOrder, list[np.ndarray]]:
        """Draw the order of a chunk's rows and divide them into row groups.

        Args:
            image: Image of each row, `(rows,)`.
            rng: Generator seeded by shard and chunk.

        Returns:
            The order of the rows, and the indices of the rows of each row group in that order.
        """
        order = order_rows(image, rng, self.n_rounds)
        first = order.argsort()
        ends = np.searchsorted(order.round[first], (np.arange(self.n - 1) + 1) * self.rounds)
        return order, np.split(first, ends)


def embeddings_batch(
    numbers: Int[np.ndarray, " images"], joint: Float[Tensor, "images d_joint"], judges: Sequence[Float[Tensor, "images _d_judge"]]
) -> pa.RecordBatch:
    """Return embeddings as a record batch with one row per image.

    Args:
        numbers: Number of each image, `(images,)`.
        joint: Embeddings in the joint image-text space, `(images, d_joint)`.
        judges: Embeddings by each judge, `(images, d_judge)`.

    Returns:
        A record batch with the columns image, joint, and one for each judge.
    """
    vectors = {"joint": joint, **dict(zip(judge_columns(len(judges)), judges, strict=True))}
    columns = {name: to_binary(vector, torch.float32) for name, vector in vectors.items()}
    return pa.RecordBatch.from_pydict({"image": pa.array(numbers, pa.int32()), **columns})


def rows_batch(numbers: Int[np.ndarray, " images"], tokens_btd: Float[Tensor, "images tokens d_model"]) -> pa.RecordBatch:
    """Return activations as a record batch with one row per token, ordered by image and token.

    Args:
        numbers: Number of each image, `(images,)`.
        tokens_btd: Activations of the kept tokens, `(images, tokens, d_model)` float16.

    Returns:
        A record batch with the columns image, place (the index of the kept token) and x.
    """
    n, per_image = tokens_btd.shape[:2]
    columns = {
        "image": pa.array(numbers.repeat(per_image), pa.int32()),
        "place": pa.array(np.tile(np.arange(per_image), n), pa.int32()),
        "x": to_binary(tokens_btd.flatten(0, 1), torch.float16),
    }
    return pa.RecordBatch.from_pydict(columns)


def split_rounds(
    numbers: Int[np.ndarray, " images"],
    tokens_btd: Float[Tensor, "images tokens d_model"],
    kept_bt: Bool[np.ndarray, "images tokens"],
    rng: np.random.Generator,
    groups: Groups,
) -> list[Any]:
    """Return the rows of a chunk that are written, as one record batch per row group of the shard, with the columns that sort them.

    Args:
        numbers: Number of each image, `(images,)`.
        tokens_btd: Activations, `(images, tokens, d_model)` float16.
        kept_bt: Whether each token is written, `(images, tokens)` bool.
        rng: Generator seeded by shard and chunk.
        groups: Row groups of the shard.

    Returns:
        A record batch for each row group, with the columns image, place, round, stratum, draw and x.
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
    """The folder of one shard's chunks. No chunk appears before it is complete."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sound: set[Path] = set()
        """Chunks that this process has found undamaged."""
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, chunk: int) -> bool:
        """Return whether a chunk was finished, by this run or by one that died. A damaged chunk is removed, so that it is made again."""
        path = self._path(chunk)
        if path not in self._sound and path.exists():
            if _checksums(path) == _read_note(path):
                self._sound.add(path)
            else:
                shutil.rmtree(path)
        return path.exists()

    def write(self, chunk: int, tables: Mapping[str, list[pa.RecordBatch]]) -> None:
        """Write a chunk.

        Args:
            chunk: Index of the chunk.
            tables: Record batches by the name of their table. Those of one table have the same schema.

        Raises:
            ArtefactError: The disk is full or cannot be written.
        """
        with writing(self._path(chunk)):
            self._write(chunk, tables)

    def _write(self, chunk: int, tables: Mapping[str, list[pa.RecordBatch]]) -> None:
        temporary = self.folder / f"{chunk:05d}.{os.getpid()}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, batches in tables.items():
            with pa.ipc.new_file(str(temporary / f"{name}.arrow"), batches[0].schema) as file:
                for batch in batches:
                    file.write_batch(batch)
            sync(temporary / f"{name}.arrow")
        (temporary / _NOTE).write_text(json.dumps(_checksums(temporary)), encoding="utf-8")
        sync(temporary / _NOTE)
        if not self.has(chunk):
            temporary.rename(self._path(chunk))

    def read(self, chunk: int, name: str, index: int = 0) -> pa.RecordBatch:
        """Read one record batch of a table."""
        # Not memory-mapped, because mapped pages would count as memory of this process.
        with pa.OSFile(str(self._path(chunk) / f"{name}.arrow")) as file:
            return pa.ipc.open_file(file).get_batch(index)

    def drop(self) -> None:
        """Remove all chunks."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:05d}"


def iter_in_order(spill: Spill, name: str, n_chunks: int, n_groups: int) -> Iterator[pa.Table]:
    """Yield the row groups of a shard, with rows in their final order."""
    for group in range(n_groups):
        rows = pa.Table.from_batches([spill.read(chunk, name, group) for chunk in range(n_chunks)])
        yield rows.take(RowOrder(*(rows[column].to_numpy() for column in ("round", "stratum", "draw"))).argsort())


class WindowCounter:
    """Counts the rows of each stratum and image as they are written, to compute the shard's window."""

    def __init__(self) -> None:
        self._strata = np.zeros(N_STRATA, np.int64)
        self._images: list[np.ndarray] = []

    def add(self, rows: pa.Table) -> pa.Table:
        """Count some rows and return them unchanged."""
        self._strata += np.bincount(rows["stratum"].to_numpy(), minlength=N_STRATA)
        self._images.append(rows["image"].to_numpy())
        return rows

    @property
    def window(self) -> int:
        """Number of consecutive rows that come from different images: see the function `window`."""
        images = np.concatenate(self._images)
        return window(self._strata, int(np.unique(images, return_counts=True)[1].max(initial=1)))


class FailureCounter:
    """Counts the images that each judge failed on as their embeddings are written."""

    def __init__(self, n_judges: int) -> None:
        self.counts = dict.fromkeys(judge_columns(n_judges), 0)
        """Number of images, by the judge's column."""

    def add(self, rows: pa.Table) -> pa.Table:
        """Count the failures in some rows of embeddings and return the rows unchanged."""
        for name in self.counts:
            self.counts[name] += int(from_float32(rows[name]).isnan().all(1).sum())
        return rows


def activation_table(rows: pa.Table, places: Sequence[Place], schema: pa.Schema) -> pa.Table:
    """Convert rows of image, place and x to the schema of the artefact.

    Args:
        rows: Table with the columns image, place and x.
        places: Descriptions of the kept tokens, by `place`.
        schema: Schema of the artefact's table.

    Returns:
        The table with that schema.
    """
    place = rows["place"]
    of_place = {field: pa.array([getattr(p, field) for p in places], schema.field(field).type) for field in ("token", "kind", "row", "col")}
    columns = {"image": rows["image"], "x": rows["x"], **{field: values.take(place.combine_chunks()) for field, values in of_place.items()}}
    return pa.table([columns[name] for name in schema.names], schema=schema)


def write_rows(writer: Writer, name: str, tables: Iterable[pa.Table], schema: pa.Schema) -> File:
    """Write a Parquet file with one row group per table. Training rows are laid out so that they can be memory-mapped.

    Args:
        writer: Writer of the draft.
        name: File name in the draft.
        tables: Contents of the row groups.
        schema: Schema of the file.

    Returns:
        The description of the file.
    """
    options = _PARQUET | (ONE_PAGE if "/train-" in f"/{name}" else {})
    with writer.write_file(name) as path, pq.ParquetWriter(path, schema, **options) as parquet:
        for table in tables:
            parquet.write_table(table.cast(schema), row_group_size=max(1, len(table)))
    return writer.describe(name)


_NOTE = "checksums.json"
"""File of a chunk that holds the checksums of its other files."""


def _checksums(chunk: Path) -> dict[str, str]:
    """Compute the checksums of a chunk's files, by name."""
    found = {}
    for path in chunk.glob("*.arrow"):
        with path.open("rb") as file:
            found[path.name] = block_sums(file)
    return found


def _read_note(chunk: Path) -> Any:
    try:
        return json.loads((chunk / _NOTE).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
