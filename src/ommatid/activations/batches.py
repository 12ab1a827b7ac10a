"""Training batches from the activations: read in sequence, mixed as they were written, in another order every epoch."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ommatid.activations.columns import from_float32
from ommatid.activations.mmap import map_column
from ommatid.compute.prefetch import prefetch
from ommatid.sae.step import Batch
from ommatid.store import Artefact

MIXED = 4
"""Shards that are read in turn: one alone begins with images that are all new, and FVU then jumps where it begins."""
Rows = tuple[np.ndarray, ...]
"""Some rows, column by column, an item a row: (rows,) each."""


@dataclass(frozen=True)
class Columns:
    """What training reads."""

    activations: Artefact
    """What is encoded."""
    target: Artefact | None = None
    """Activations of the same tokens at another hookpoint, which are to be reconstructed (a transcoder)."""
    with_joint: bool = False
    """Whether each token comes with the joint embedding of its image, all of which are then held in memory in float16."""


@dataclass(frozen=True)
class Share:
    """Which rows of each batch one of several processes takes."""

    rank: int = 0
    """Which process."""
    n: int = 1
    """How many."""


def iter_batches(columns: Columns | Artefact, batch_size: int, seed: int, start: int = 0, share: Share | None = None) -> Iterator[Batch]:
    """Batches of float16 rows for ever, from step `start` on; an epoch leaves out the rows that fill no batch.

    The order is a function of seed and epoch: shards come in a new order, some of them in turn, and their rows, which are mixed as they
    lie (see extract/rows.py), are shuffled anew within windows. Windows hold whole batches, so that a batch's rows come from as many
    images, where a shard has so many. Several processes share each batch: the order does not depend on their number.
    """
    columns = columns if isinstance(columns, Columns) else Columns(columns)
    make = _Maker(columns, share or Share())
    steps_per_epoch = columns.activations.rows("train") // batch_size
    epoch, skip = divmod(start, steps_per_epoch)
    while True:
        batches = _iter_epoch(columns, batch_size, np.random.default_rng([seed, epoch]))
        yield from (make(*rows) for step, rows in enumerate(batches) if step >= skip)
        epoch, skip = epoch + 1, 0


def load_sample(activations: Artefact, n: int) -> Tensor:
    """The first n training tokens (n, d_model) float32: rows are shuffled, so they are a fair sample."""
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
    """Batches of `MIXED` shards in turn; where one ends the next begins, so that the images of a batch are seldom new all at once."""
    activations = columns.activations
    parts = activations.parts("train")
    window = max(1, activations.summary["window"] // batch_size) * batch_size
    rest = _Rest(batch_size, rng)
    waiting = iter([parts[index] for index in rng.permutation(len(parts))])
    with ExitStack() as stack:

        def begin(part: str) -> Iterator[tuple[Rows, np.ndarray]]:
            return stack.enter_context(closing(_read_part(columns, part, batch_size, window, rest, rng)))

        reading = [begin(part) for part in islice(waiting, MIXED)]
        turn = 0
        while reading:
            turn %= len(reading)
            batch = next(reading[turn], None)
            if batch is not None:
                yield batch
                turn += 1
            elif part := next(waiting, None):
                reading[turn] = begin(part)
            else:
                del reading[turn]


def _read_part(
    columns: Columns, part: str, batch_size: int, window: int, rest: "_Rest", rng: np.random.Generator
) -> Generator[tuple[Rows, np.ndarray], None, None]:
    with columns.activations.open_part(part) as file:
        n_rows = file.metadata.num_rows
    with _open(columns, part) as row_groups, ExitStack() as stack:
        ready = [_Column(stack.enter_context(closing(prefetch(groups, 2)))) for groups in row_groups]
        yield from _iter_part(_Near(ready), n_rows, batch_size, window, rest, rng)


def _iter_part(
    rows: "_Near", n: int, batch_size: int, window: int, rest: "_Rest", rng: np.random.Generator
) -> Iterator[tuple[Rows, np.ndarray]]:
    """Rows that are near, and which of them are a batch."""
    # the borders of the batches lie elsewhere every epoch
    first = int(rng.integers(min(batch_size, n + 1)))
    yield from rest.add(rows.take(first))
    left = n - first
    while left >= batch_size:
        size = min(window, left // batch_size * batch_size)
        near, order = rows.take(size), rng.permutation(size)
        yield from ((near, places) for places in np.split(order, range(batch_size, size, batch_size)))
        left -= size
    yield from rest.add(rows.take(left))


class _Maker:
    """Makes a batch of rows, or a process's share of it."""

    def __init__(self, columns: Columns, share: Share) -> None:
        self._has_target = columns.target is not None
        self._joint = _Joint(columns.activations) if columns.with_joint else None
        self._share = share

    def __call__(self, rows: Rows, places: np.ndarray) -> Batch:
        mine = places[self._share.rank :: self._share.n]
        columns = [column.take(mine) for column in rows]
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
        """Of some images, (rows, d_joint) float16."""
        return self._joint[torch.from_numpy(self._place[images])]


class _Near:
    """The rows of a part, in order."""

    def __init__(self, columns: Sequence["_Column"]) -> None:
        self._columns = columns

    def take(self, n: int) -> Rows:
        """The next n rows, until the next call."""
        return tuple(column.take(n) for column in self._columns)


class _Column:
    """One column of a part, row group by row group."""

    def __init__(self, row_groups: Iterator[np.ndarray]) -> None:
        self._row_groups = row_groups
        self._waiting = next(row_groups, np.empty(0, "V1"))
        self._joined = self._waiting[:0]

    def take(self, n: int) -> np.ndarray:
        """The next n items, until the next call: of one row group as they lie there, of several put together."""
        pieces, left = [self._waiting[:n]], n - len(self._waiting)
        self._waiting = self._waiting[n:]
        while left > 0:
            group = next(self._row_groups)
            pieces.append(group[:left])
            self._waiting, left = group[left:], left - len(group)
        if len(pieces) == 1:
            return pieces[0]
        if len(self._joined) < n:
            self._joined = np.empty(n, self._waiting.dtype)  # kept: new memory has to be zeroed every time
        return np.concatenate(pieces, out=self._joined[:n])


class _Rest:
    """Rows at the ends of parts, which fill batches of their own."""

    def __init__(self, batch_size: int, rng: np.random.Generator) -> None:
        self._batch_size = batch_size
        self._rng = rng
        self._pieces: list[Rows] = []

    def add(self, rows: Rows) -> Iterator[tuple[Rows, np.ndarray]]:
        """Keep a copy of some rows; gives the batches that are full."""
        self._pieces += [tuple(column.copy() for column in rows)] if len(rows[0]) else []
        n = sum(len(piece[0]) for piece in self._pieces)
        if n < self._batch_size:
            return
        joined = tuple(np.concatenate(column) for column in zip(*self._pieces, strict=True))
        order = self._rng.permutation(n)
        n_whole = n // self._batch_size * self._batch_size
        self._pieces = [tuple(column[order[n_whole:]] for column in joined)]  # before the first batch: another part may add in between
        for first in range(0, n_whole, self._batch_size):
            yield joined, order[first : first + self._batch_size]


@contextmanager
def _open(columns: Columns, part: str) -> Iterator[list[Iterator[np.ndarray]]]:
    """The row groups of a part, column by column: x, then target and image where they are asked for."""
    wanted = [(columns.activations, "x")]
    wanted += [(columns.target, "x")] if columns.target else []
    wanted += [(columns.activations, "image")] if columns.with_joint else []
    with ExitStack() as stack:
        files = [stack.enter_context(artefact.open_part(part)) for artefact, _ in wanted]
        yield [_iter_column(artefact, part, file, name) for (artefact, name), file in zip(wanted, files, strict=True)]


def _iter_column(artefact: Artefact, part: str, file: pq.ParquetFile, name: str) -> Iterator[np.ndarray]:
    """A fixed-width column of each row group, (rows,): mapped where it lies on this machine's disk in one piece."""
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
    """Items of little-endian float16 as (rows, width)."""
    return torch.from_numpy(items.view("<f2").reshape(len(items), -1))
