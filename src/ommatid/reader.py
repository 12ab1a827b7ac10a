"""Training batches from the activations: read in sequence, mixed as they were written, in another order every epoch."""

from collections.abc import Generator, Iterator
from contextlib import closing

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ommatid.ahead import ahead
from ommatid.mapped import map_column
from ommatid.store import Artefact
from ommatid.tensors import view_float16


def iter_batches(activations: Artefact, batch_size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Float16 batches (batch, d_model) for ever, from step `start` on; an epoch leaves out the rows that fill no batch.

    The order is a function of seed and epoch: shards come in a new order, and their rows, which are mixed as they lie (see
    extract/shuffle.py), are shuffled anew within windows. Windows hold whole batches, so that a batch's rows come from as many
    images, where a shard has so many.
    """
    steps_per_epoch = activations.rows("train") // batch_size
    epoch, skip = divmod(start, steps_per_epoch)
    while True:
        batches = _iter_epoch(activations, batch_size, np.random.default_rng([seed, epoch]))
        for step, batch in enumerate(batches):
            if step >= skip:
                yield batch
        epoch, skip = epoch + 1, 0


def load_sample(activations: Artefact, n: int) -> Tensor:
    """The first n training tokens (n, d_model) float32: rows are shuffled, so they are a fair sample."""
    pieces, found = [], 0
    for part in activations.parts("train"):
        with activations.open_part(part) as file, closing(_iter_row_groups(activations, part, file)) as row_groups:
            for x in row_groups:
                pieces.append(torch.from_numpy(x[: n - found].astype(np.float32)))
                found += len(pieces[-1])
                if found == n:
                    return torch.cat(pieces)
    return torch.cat(pieces)


def _iter_epoch(activations: Artefact, batch_size: int, rng: np.random.Generator) -> Iterator[Tensor]:
    parts = activations.parts("train")
    window = max(1, activations.summary["window"] // batch_size) * batch_size
    rest = _Rest(batch_size, rng)
    for part in (parts[index] for index in rng.permutation(len(parts))):
        with activations.open_part(part) as file, closing(ahead(_iter_row_groups(activations, part, file), 2)) as row_groups:
            yield from _iter_part(_Rows(row_groups), file.metadata.num_rows, batch_size, window, rest, rng)


def _iter_part(rows: "_Rows", n: int, batch_size: int, window: int, rest: "_Rest", rng: np.random.Generator) -> Iterator[Tensor]:
    # the borders of the batches lie elsewhere every epoch
    first = int(rng.integers(min(batch_size, n + 1)))
    yield from rest.add(torch.from_numpy(rows.take(first).copy()))
    left = n - first
    while left >= batch_size:
        size = min(window, left // batch_size * batch_size)
        yield from _iter_mixed(rows.take(size), batch_size, rng)
        left -= size
    yield from rest.add(torch.from_numpy(rows.take(left).copy()))


def _iter_mixed(x: np.ndarray, batch_size: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Batches of the rows of x in random order."""
    whole_rows = x.view(f"V{x.shape[1] * x.itemsize}")[:, 0]  # one item a row: numpy copies these fastest
    for places in np.split(rng.permutation(len(x)), range(batch_size, len(x), batch_size)):
        yield torch.from_numpy(whole_rows.take(places).view(x.dtype).reshape(len(places), -1))


class _Rows:
    """The rows of a part, in order."""

    def __init__(self, row_groups: Iterator[np.ndarray]) -> None:
        self._row_groups = row_groups
        self._waiting = self._joined = np.empty((0, 0), np.float16)

    def take(self, n: int) -> np.ndarray:
        """The next n rows, (n, d_model), until the next call: of one row group as they lie there, of several put together."""
        pieces, left = [], n
        while left:
            if not len(self._waiting):
                self._waiting = next(self._row_groups)
            pieces.append(self._waiting[:left])
            self._waiting, left = self._waiting[left:], left - len(pieces[-1])
        if len(pieces) < 2:
            return pieces[0] if pieces else self._waiting[:0]
        if self._joined.shape < (n, pieces[0].shape[1]):
            self._joined = np.empty((n, pieces[0].shape[1]), np.float16)  # kept: new memory would have to be zeroed every time
        return np.concatenate(pieces, out=self._joined[:n])


class _Rest:
    """Rows at the ends of parts, which fill batches of their own."""

    def __init__(self, batch_size: int, rng: np.random.Generator) -> None:
        self._batch_size = batch_size
        self._rng = rng
        self._pieces: list[Tensor] = []

    def add(self, rows: Tensor) -> Iterator[Tensor]:
        """Keep some rows; gives the batches that are full."""
        self._pieces += [rows] if len(rows) else []
        n = sum(map(len, self._pieces))
        if n < self._batch_size:
            return
        x = torch.cat(self._pieces)
        x = x[torch.from_numpy(self._rng.permutation(n))]
        n_whole = n // self._batch_size * self._batch_size
        yield from x[:n_whole].split(self._batch_size)
        self._pieces = [x[n_whole:]]


def _iter_row_groups(activations: Artefact, part: str, file: pq.ParquetFile) -> Generator[np.ndarray, None, None]:
    """The activations of each row group, (rows, d_model) float16: mapped where they lie on this machine's disk in one piece."""
    path, column = activations.local(part), file.schema_arrow.get_field_index("x")
    width = file.schema_arrow.field("x").type.byte_width
    for group in range(file.num_row_groups):
        values = map_column(path, file, group, column, width) if path else None
        if values is None:
            yield view_float16(file.read_row_group(group, ["x"])["x"])
        else:
            yield values.view("<f2").reshape(-1, width // 2)
