"""The outputs of a shard's images: rows that are in the cache, and batches of the images that are not, which networks are run on.

Every batch has `extract.batch_size` images, if necessary with black ones at its end, because results for an image may depend on the shape
of the batch. If they depend on the other images as well, or if it is not known yet, a network runs on the images of each chunk in order,
so that the result is the same whatever the cache holds.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ommatid.extract.cache import OutputCache
from ommatid.extract.networks import Networks, Output
from ommatid.extract.plan import Run
from ommatid.images.loader import Encoded, Pixels, iter_pixels
from ommatid.store import Artefact
from ommatid.store.row_store import as_keys
from ommatid.vlm.preprocess import Preprocess


@dataclass(frozen=True)
class ChunkOutputs:
    """The images of a chunk and their outputs."""

    numbers: np.ndarray
    """Number of each image, `(images,)`."""
    is_train: np.ndarray
    """Whether each image is in the training split, `(images,)` bool."""
    of: Mapping[Output, Tensor]
    """Outputs of all networks, `(images, *shape)` on the CPU."""


Places = list[tuple[int, int]]
"""Position of the chunk, and index in the chunk, of each of some images, in order."""


@dataclass(frozen=True)
class _Batch:
    """Images that networks are run on together."""

    wanted: tuple[Output, ...]
    """Outputs to compute."""
    places: Places
    """The images."""


class Chunk:
    """The images of a chunk."""

    def __init__(self, index: int, runs: Sequence[Run], facts: pa.Table) -> None:
        self.index = index
        """Index of the chunk in its shard."""
        self.numbers: np.ndarray = facts["image"].to_numpy()
        """Number of each image, `(images,)`."""
        self.is_train = np.array([split == "train" for split in facts["split"].to_pylist()], dtype=bool)
        """Whether each image is in the training split, `(images,)` bool."""
        self.digests: list[str] = facts["image_id"].to_pylist()
        """The sha256 of each image file, in hex."""
        self.keys = as_keys(self.digests)
        """The same, as the keys of the cache."""
        self.origin = [(run.block.file, run.block.row_group, row) for run in runs for row in range(run.start, run.start + run.n_images)]
        """File, row group and row in the row group of each image."""


class ShardImages:
    """The images of some chunks of a shard."""

    def __init__(self, images: Artefact, chunks: Mapping[int, Sequence[Run]]) -> None:
        """Read what is known of the images, but not the images themselves.

        Args:
            images: The images artefact.
            chunks: The runs of images of each chunk, by its index in the shard.
        """
        self._images = images
        self._parts = images.parts("images")
        columns = ["image", "split", "image_id"]
        runs = [(run.block.file, run.block.row_group) for of_chunk in chunks.values() for run in of_chunk]
        groups = self._iter_groups(runs, columns)
        self.chunks = [
            Chunk(index, of_chunk, pa.concat_tables(next(groups).slice(run.start, run.n_images) for run in of_chunk))
            for index, of_chunk in chunks.items()
        ]
        """The chunks, whose positions here are those in `Places`."""

    def iter_encoded(self, batches: Iterable[tuple[Places, tuple[Preprocess, ...]]]) -> Iterator[Encoded]:
        """Read the files of images, in batches with the preprocessings to apply. Row groups that hold none of them are not read."""
        batches = list(batches)
        wanted = ([self.chunks[position].origin[i] for position, i in places] for places, _ in batches)
        of_batches = [
            [(file, group, [row for *_, row in rows]) for (file, group), rows in groupby(origins, lambda o: o[:2])] for origins in wanted
        ]
        groups = self._iter_groups([(file, group) for parts in of_batches for file, group, _ in parts], ["encoded"])
        for (places, preprocesses), parts in zip(batches, of_batches, strict=True):
            files = [file for *_, rows in parts for file in next(groups)["encoded"].take(rows).to_pylist()]
            numbers = np.array([self.chunks[position].numbers[i] for position, i in places])
            is_train = np.array([self.chunks[position].is_train[i] for position, i in places])
            yield Encoded(numbers, is_train, files, preprocesses)

    def _iter_groups(self, groups: Iterable[tuple[int, int]], columns: list[str]) -> Iterator[pa.Table]:
        """Yield columns of row groups, given by file and number. A file, or a row group, is read once for all adjacent requests."""
        for file, of_file in groupby(groups, lambda group: group[0]):
            with self._images.open_part(self._parts[file]) as opened:
                for number, requests in groupby(of_file, lambda group: group[1]):
                    table = opened.read_row_group(number, columns)
                    yield from (table for _ in requests)


class ShardOutputs:
    """Finds or computes the outputs of the images of a shard."""

    def __init__(self, images: ShardImages, networks: Networks, cache: OutputCache, pool: Executor, submit: Callable[..., None]) -> None:
        """Prepare to run networks.

        Args:
            images: The images.
            networks: The networks.
            cache: The cache of their outputs.
            pool: Pool that decodes images.
            submit: Function that calls a function with arguments in the thread that writes.
        """
        self._images = images
        self._chunks = images.chunks
        self._networks = networks
        self._cache = cache
        self._pool = pool
        self._submit = submit
        self._computed: list[list[tuple[np.ndarray, Mapping[Output, Tensor]]]] = [[] for _ in self._chunks]
        """For each chunk, indices of images, and outputs that were computed for them."""
        self._forwarded: set[tuple[int, int]] = set()

    @property
    def n_forwarded(self) -> int:
        """Number of images that at least one network has been run on so far."""
        return len(self._forwarded)

    def __iter__(self) -> Iterator[tuple[int, ChunkOutputs]]:
        """Yield the index and the outputs of each chunk, while images of later ones are decoded."""
        self._cache.refresh()
        batches = self._plan()
        waiting, pixels = deque(batches), self._iter_pixels(batches)
        for position, chunk in enumerate(self._chunks):
            while waiting and waiting[0].places[0][0] <= position:
                self._forward(waiting.popleft(), next(pixels))
            self._flush()  # Before the chunk counts as done, as a run that continues after it would not add its rows to the cache.
            yield chunk.index, self._collect(position)
        self._flush()

    def _plan(self) -> list[_Batch]:
        """Divide the images to be run through networks into batches, in the order of the chunks in which they begin."""
        size = self._networks.params.batch_size
        fixed = tuple(output for output in self._networks.outputs if not self._cache.is_reused(output))
        batches: list[_Batch] = []
        open_: defaultdict[tuple[Output, ...], Places] = defaultdict(list)
        for position, chunk in enumerate(self._chunks):
            missing = self._missing(chunk, fixed)
            places = [(position, i) for i in range(len(chunk.numbers))]
            if fixed:
                merged = missing.pop() if len(set(missing)) == 1 else ()
                missing = [] if merged or not any(missing) else missing
                wanted = tuple(output for output in self._networks.outputs if output in (*fixed, *merged))
                batches += [_Batch(wanted, places[start : start + size]) for start in range(0, len(places), size)]
            for place, wanted in zip(places, missing, strict=bool(missing)):
                if wanted:
                    open_[wanted].append(place)
                    if len(open_[wanted]) == size:
                        batches.append(_Batch(wanted, open_.pop(wanted)))
        batches += [_Batch(wanted, places) for wanted, places in open_.items()]
        return sorted(batches, key=lambda batch: batch.places[0][0])

    def _missing(self, chunk: Chunk, fixed: Sequence[Output]) -> list[tuple[Output, ...]]:
        """Return, for each image of a chunk, the outputs that have to be computed for it because the cache lacks them."""
        outputs = [output for output in self._networks.outputs if output not in fixed]
        found = np.array([self._cache.has(output, chunk.keys) for output in outputs]).reshape(len(outputs), len(chunk.numbers))
        sets = {tuple(column): tuple(o for o, there in zip(outputs, column, strict=True) if not there) for column in found.T.tolist()}
        return [sets[tuple(column)] for column in found.T.tolist()]

    def _iter_pixels(self, batches: Sequence[_Batch]) -> Iterator[Pixels]:
        encoded = self._images.iter_encoded((batch.places, self._networks.preprocesses_of(batch.wanted)) for batch in batches)
        return iter_pixels(encoded, (), self._pool, self._networks.device)

    def _forward(self, batch: _Batch, pixels: Pixels) -> None:
        """Run networks on a batch, and note the outputs for its images."""
        size = self._networks.params.batch_size
        whole = {p: _pad(x, size) for p, x in zip(self._networks.preprocesses_of(batch.wanted), pixels.of, strict=True)}
        outputs = self._networks.forward(whole, batch.wanted)
        positions, indices = np.array(batch.places).T
        keys = np.concatenate([self._chunks[position].keys[i : i + 1] for position, i in batch.places])
        self._cache.add(keys, whole, outputs)
        if self._cache.is_full:
            self._flush()
        for position in np.unique(positions):
            rows = np.flatnonzero(positions == position)
            part = slice(int(rows[0]), int(rows[-1]) + 1)  # Images of a chunk are adjacent in a batch.
            self._computed[position].append((indices[part], {output: x[part] for output, x in outputs.items()}))
        self._forwarded.update(batch.places)

    def _flush(self) -> None:
        self._submit(self._cache.write, self._cache.take())

    def _collect(self, position: int) -> ChunkOutputs:
        """Put the outputs of a chunk together from what was computed and what the cache holds."""
        chunk = self._chunks[position]
        n = len(chunk.numbers)
        found = {output: torch.empty(n, *output.shape, dtype=output.dtype) for output in self._networks.outputs}
        is_there = {output: np.zeros(n, dtype=bool) for output in found}
        self._fill(position, found, is_there)
        lost: defaultdict[tuple[int, ...], list[Output]] = defaultdict(list)
        for output, there in is_there.items():
            left = np.flatnonzero(~there)
            if len(left):
                rows = torch.empty(len(left), *output.shape, dtype=output.dtype)
                read = self._cache.read(output, chunk.keys[left], rows)
                found[output][torch.from_numpy(left[read])] = rows[torch.from_numpy(read)]
                if not read.all():
                    lost[tuple(left[~read].tolist())].append(output)
        for indices, outputs in lost.items():  # Rows that were damaged, or removed since they were looked up.
            self._recompute(position, indices, tuple(outputs))
        self._fill(position, found, is_there)
        return ChunkOutputs(chunk.numbers, chunk.is_train, found)

    def _recompute(self, position: int, indices: Sequence[int], wanted: tuple[Output, ...]) -> None:
        size = self._networks.params.batch_size
        places = [(position, i) for i in indices]
        batches = [_Batch(wanted, places[start : start + size]) for start in range(0, len(places), size)]
        for batch, pixels in zip(batches, self._iter_pixels(batches), strict=True):
            self._forward(batch, pixels)

    def _fill(self, position: int, found: Mapping[Output, Tensor], is_there: Mapping[Output, np.ndarray]) -> None:
        """Move what was computed for a chunk to its place."""
        while self._computed[position]:
            indices, outputs = self._computed[position].pop()
            for output, rows in outputs.items():
                found[output][torch.from_numpy(indices)] = rows
                is_there[output][indices] = True


def _pad(x: Tensor, size: int) -> Tensor:
    """Return a batch with black images at its end, so that it has `size` images."""
    return x if len(x) == size else torch.cat([x, x.new_zeros(size - len(x), *x.shape[1:])])
