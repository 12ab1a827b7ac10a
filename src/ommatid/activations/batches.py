"""Training batches of activations: rows are read sequentially, mixed further, and come in a different order every epoch."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow.parquet as pq
import torch
from jaxtyping import Float32
from torch import Tensor

from ommatid.activations.columns import from_float32
from ommatid.activations.mmap import map_column
from ommatid.compute.prefetch import prefetch
from ommatid.sae.step import Batch
from ommatid.store import Artefact

SHARDS_AT_ONCE = 4
"""Number of shards that are read in turn. With one at a time, FVU would jump whenever a shard begins, because all its images are new."""
Rows = tuple[np.ndarray, ...]
"""Some rows as columns, with one item per row, `(rows,)` each."""


@dataclass(frozen=True)
class Columns:
    """The columns that training reads."""

    activations: Artefact
    """Activations to encode."""
    target: Artefact | None = None
    """Activations of the same tokens at another hookpoint, which a transcoder reconstructs."""
    with_joint: bool = False
    """Whether batches include the joint embedding of each token's image. All embeddings are then held in memory in float16."""


@dataclass(frozen=True)
class Share:
    """One process's share of the rows of each batch."""

    rank: int = 0
    """Rank of the process, from 0."""
    n: int = 1
    """Number of processes."""


def iter_batches(columns: Columns | Artefact, batch_size: int, seed: int, start: int = 0, share: Share | None = None) -> Iterator[Batch]:
    """Yield batches of float16 rows without end. Each epoch leaves out the last few rows if they do not fill a batch.

    The order depends only on the seed and the epoch, and not on the number of processes. In each epoch the shards come in a new order,
    several are read in turn, and rows are shuffled within windows of whole batches. Rows were already mixed when they were written (see
    extract/rows.py), so that the rows of a batch come from many images.

    Args:
        columns: Columns to read.
        batch_size: Rows per batch, over all processes.
        seed: Seed of the order.
        start: Step of the first batch.
        share: This process's share of each batch; None means all of it.

    Yields:
        This process's share of each batch.
    """
    columns = columns if isinstance(columns, Columns) else Columns(columns)
    make = _BatchMaker(columns, share or Share())
    steps_per_epoch = columns.activations.rows("train") // batch_size
    epoch, skip = divmod(start, steps_per_epoch)
    while True:
        batches = _iter_epoch(columns, batch_size, np.random.default_rng([seed, epoch]))
        yield from (make(*rows) for step, rows in enumerate(batches) if step >= skip)
        epoch, skip = epoch + 1, 0


def load_sample(activations: Artefact, n: int) -> Float32[Tensor, "tokens d_model"]:
    """Return the first n training tokens, `(n, d_model)` float32. They are a random sample, because rows were shuffled."""
    pieces, found = [], 0
    for part in activations.parts("train"):
        with _open(Columns(activations), part) as (row_groups,):
            for items in row_groups:
                pieces.append(_vectors(items[: n - found].copy()).float())
                found += len(pieces[-1])
                if found == n:
                    return torch.cat(pieces)
    return torch.cat(pieces)


def _iter_epoch(columns: Columns, batch_size: int, rng: np.random.Generator) -> Iterator[tuple[Rows, np.ndarray]]:
    """Yield batches from `SHARDS_AT_ONCE` shards in turn. When one ends, the next begins, so shards seldom begin at the same time."""
    activations = columns.activations
    parts = activations.parts("train")
    window = max(1, activations.summary["window"] // batch_size) * batch_size
    leftovers = _Leftovers(batch_size, rng)
    unread = iter([parts[index] for index in rng.permutation(len(parts))])
    with ExitStack() as stack:

        def begin(part: str) -> Iterator[tuple[Rows, np.ndarray]]:
            return stack.enter_context(closing(_read_part(columns, part, batch_size, window, leftovers, rng)))

        reading = [begin(part) for part in islice(unread, SHARDS_AT_ONCE)]
        turn = 0
        while reading:
            turn %= len(reading)
            batch = next(reading[turn], None)
            if batch is not None:
                yield batch
                turn += 1
            elif part := next(unread, None):
                reading[turn] = begin(part)
            else:
                del reading[turn]


def _read_part(
    columns: Columns, part: str, batch_size: int, window: int, leftovers: "_Leftovers", rng: np.random.Generator
) -> Generator[tuple[Rows, np.ndarray], None, None]:
    with columns.activations.open_part(part) as file:
        n_rows = file.metadata.num_rows
    with _open(columns, part) as row_groups, ExitStack() as stack:
        ready = [_Column(stack.enter_context(closing(prefetch(groups, 2)))) for groups in row_groups]
        yield from _iter_part(_PartReader(ready), n_rows, batch_size, window, leftovers, rng)


def _iter_part(
    rows: "_PartReader", n: int, batch_size: int, window: int, leftovers: "_Leftovers", rng: np.random.Generator
) -> Iterator[tuple[Rows, np.ndarray]]:
    """Yield batches: a window of rows, and the indices of the rows in it that form the batch."""
    # The first rows are set aside, so that batches begin at different rows in every epoch.
    first = int(rng.integers(min(batch_size, n + 1)))
    yield from leftovers.add(rows.take(first))
    left = n - first
    while left >= batch_size:
        size = min(window, left // batch_size * batch_size)
        window_rows, order = rows.take(size), rng.permutation(size)
        yield from ((window_rows, places) for places in np.split(order, range(batch_size, size, batch_size)))
        left -= size
    yield from leftovers.add(rows.take(left))


class _BatchMaker:
    """Makes a batch, or a process's share of it, from rows."""

    def __init__(self, columns: Columns, share: Share) -> None:
        self._has_target = columns.target is not None
        self._joint = _Joint(columns.activations) if columns.with_joint else None
        self._share = share

    def __call__(self, rows: Rows, places: np.ndarray) -> Batch:
        own_places = places[self._share.rank :: self._share.n]
        columns = [column.take(own_places) for column in rows]
        x = _vectors(columns[0])
        joint = self._joint.of(columns[-1].view("<i4")) if self._joint else None
        return Batch(x, _vectors(columns[1]) if self._has_target else x, joint)


class _Joint:
    """The joint embeddings of all images."""

    def __init__(self, activations: Artefact) -> None:
        rows = activations.read("embeddings", ["image", "joint"])
        images = rows["image"].to_numpy()
        self._place = np.zeros(int(images.max(initial=0)) + 1, np.int64)
        self._place[images] = np.arange(len(images))
        self._joint = from_float32(rows["joint"]).half()

    def of(self, images: np.ndarray) -> Tensor:
        """Return the embeddings of some images, `(rows, d_joint)` float16."""
        return self._joint[torch.from_numpy(self._place[images])]


class _PartReader:
    """Reads the rows of a part, in order."""

    def __init__(self, columns: Sequence["_Column"]) -> None:
        self._columns = columns

    def take(self, n: int) -> Rows:
        """Return the next n rows, which are valid until the next call."""
        return tuple(column.take(n) for column in self._columns)


class _Column:
    """Reads one column of a part, row group by row group."""

    def __init__(self, row_groups: Iterator[np.ndarray]) -> None:
        self._row_groups = row_groups
        self._unread = next(row_groups, np.empty(0, "V1"))
        self._joined = self._unread[:0]

    def take(self, n: int) -> np.ndarray:
        """Return the next n items, valid until the next call. They are copied only if they span several row groups."""
        pieces, left = [self._unread[:n]], n - len(self._unread)
        self._unread = self._unread[n:]
        while left > 0:
            group = next(self._row_groups)
            pieces.append(group[:left])
            self._unread, left = group[left:], left - len(group)
        if len(pieces) == 1:
            return pieces[0]
        if len(self._joined) < n:
            self._joined = np.empty(n, self._unread.dtype)  # Reused, because the system zeroes newly allocated memory.
        return np.concatenate(pieces, out=self._joined[:n])


class _Leftovers:
    """Rows from the beginnings and ends of parts, which are collected into batches of their own."""

    def __init__(self, batch_size: int, rng: np.random.Generator) -> None:
        self._batch_size = batch_size
        self._rng = rng
        self._pieces: list[Rows] = []

    def add(self, rows: Rows) -> Iterator[tuple[Rows, np.ndarray]]:
        """Copy some rows, and yield the batches that are full."""
        self._pieces += [tuple(column.copy() for column in rows)] if len(rows[0]) else []
        n = sum(len(piece[0]) for piece in self._pieces)
        if n < self._batch_size:
            return
        joined = tuple(np.concatenate(column) for column in zip(*self._pieces, strict=True))
        order = self._rng.permutation(n)
        n_whole = n // self._batch_size * self._batch_size
        # Set before the first yield, because other parts may add rows between batches.
        self._pieces = [tuple(column[order[n_whole:]] for column in joined)]
        for first in range(0, n_whole, self._batch_size):
            yield joined, order[first : first + self._batch_size]


@contextmanager
def _open(columns: Columns, part: str) -> Iterator[list[Iterator[np.ndarray]]]:
    """Open a part, and yield the row groups of each column: x, then target and image if they are read."""
    wanted = [(columns.activations, "x")]
    wanted += [(columns.target, "x")] if columns.target else []
    wanted += [(columns.activations, "image")] if columns.with_joint else []
    with ExitStack() as stack:
        files = [stack.enter_context(artefact.open_part(part)) for artefact, _ in wanted]
        yield [_iter_column(artefact, part, file, name) for (artefact, name), file in zip(wanted, files, strict=True)]


def _iter_column(artefact: Artefact, part: str, file: pq.ParquetFile, name: str) -> Iterator[np.ndarray]:
    """Yield a fixed-width column of each row group, `(rows,)`. It is memory-mapped if it is contiguous on this machine's disk."""
    path, index = artefact.local(part), file.schema_arrow.get_field_index(name)
    width = file.schema_arrow.field(name).type.byte_width
    for group in range(file.num_row_groups):
        if path:
            artefact.check_chunk(part, file.metadata, group, index)
        values = map_column(path, file, group, index, width) if path else None
        yield _read_column(file, group, name, width) if values is None else values


def _read_column(file: pq.ParquetFile, group: int, name: str, width: int) -> np.ndarray:
    column = file.read_row_group(group, [name])[name].combine_chunks()
    return np.frombuffer(column.buffers()[1], np.dtype(f"V{width}"), count=len(column), offset=column.offset * width)


def _vectors(items: np.ndarray) -> Tensor:
    """View items of little-endian float16 as a tensor, `(rows, width)`."""
    return torch.from_numpy(items.view("<f2").reshape(len(items), -1))
