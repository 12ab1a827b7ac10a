"""The plan of an import, which divides files into blocks of consecutive entries and deals these to shards at random."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ommatid.errors import SourceError
from ommatid.extract.from_files.base import ActivationFile
from ommatid.extract.plan import IMAGES_PER_SHARD, SEED

BYTES_PER_BLOCK = 2**23
"""Bytes per block in float16. One block is read at a time, and lost if the run is interrupted."""
BYTES_PER_SHARD = 2**27
"""Largest size of a shard in float16, in bytes, unless the shard would have too few images. One row group of it is held in memory."""
MAX_IMAGES = 2**31
"""Largest number of images, because `image` is an int32."""


@dataclass(frozen=True)
class FileBlock:
    """Consecutive entries of one file."""

    file: int
    """Index of the file."""
    index: int
    """Index of the block in the file."""
    n_rows: int
    """Number of tokens in the block."""
    n_images: int
    """Number of images in the block."""
    most: int
    """Largest number of tokens that one image has in the block."""
    before: int
    """Number of consecutive entries just before the block that belong to the block's first image."""


class FilePlan:
    """The plan of an import: which blocks each shard holds. It is determined by the shapes and the images of the files.

    Raises:
        SourceError: The number of an image is negative or does not fit into an int32, or there are too many images.
    """

    def __init__(self, files: Sequence[ActivationFile]) -> None:
        self._files = files
        self.d_model = files[0].shape[-1]
        self.tokens = math.prod(files[0].shape[1:-1])
        """Number of rows per entry."""
        self.entries = max(1, BYTES_PER_BLOCK // (2 * self.tokens * self.d_model))
        """Number of entries per block. The last block of a file may have fewer."""
        self._images = _ImageCounter()
        self.blocks = [block for index, file in enumerate(files) for block in self._cut(index, file)]
        self.n_rows = sum(block.n_rows for block in self.blocks)
        self.n_images = self._images.n if files[0].has_images else self.n_rows // self.tokens
        if self.n_images > MAX_IMAGES:
            raise SourceError(
                f"{files[0].path}: {self.n_images} images in all, at most {MAX_IMAGES} are allowed; use `image` to say which rows "
                "belong to one image"
            )

    def _cut(self, index: int, file: ActivationFile) -> Iterator[FileBlock]:
        for i, (n, n_images, most, before) in enumerate(self._count(file)):
            yield FileBlock(index, i, n * self.tokens, n_images, most * self.tokens, before)

    def _count(self, file: ActivationFile) -> Iterator[tuple[int, int, int, int]]:
        """Yield four numbers for each block of a file.

        They are the number of entries, the number of images, the largest number of entries of one image, and the number of consecutive
        entries just before the block that belong to its first image.
        """
        if not file.has_images:
            yield from ((n, n, 1, 0) for start in range(0, file.shape[0], self.entries) for n in [min(self.entries, file.shape[0] - start)])
            return
        row, last, run = 0, -1, 0
        for images in file.iter_images(self.entries):
            bad = ((images < 0) | (images >= MAX_IMAGES)).nonzero()[0]
            if len(bad):
                raise SourceError(
                    f"{file.path}: the image of row {row + bad[0]} is {images[bad[0]]}; it must be from 0 to {MAX_IMAGES - 1}"
                )
            different, counts = np.unique(images, return_counts=True)
            self._images.add(different)
            before = run if images[0] == last else 0
            yield len(images), len(different), int(counts.max()), before
            last, run = int(images[-1]), int(places_in_runs(images, before)[-1]) + 1
            row += len(images)

    @cached_property
    def starts(self) -> list[int]:
        """Number of the first image of each file, if the files do not number their images themselves."""
        return [0, *np.cumsum([file.shape[0] for file in self._files]).tolist()]

    @cached_property
    def shards(self) -> list[list[FileBlock]]:
        """Blocks of each shard, in the order of the files. No shard is empty."""
        n_bytes = 2 * self.n_rows * self.d_model
        n = max(1, min(len(self.blocks), self.n_images // IMAGES_PER_SHARD, math.ceil(n_bytes / BYTES_PER_SHARD)))
        rows = np.array([block.n_rows for block in self.blocks])
        order = np.random.default_rng(SEED).permutation(len(rows))
        middle = rows[order].cumsum() - rows[order] / 2
        dealt = np.minimum((middle * n / rows.sum()).astype(np.int64), n - 1)
        return [[self.blocks[i] for i in sorted(order[dealt == shard])] for shard in np.unique(dealt)]


class _ImageCounter:
    """Counts distinct images, using one bit of memory for each."""

    def __init__(self) -> None:
        self._bits = np.zeros(0, np.uint8)

    def add(self, images: np.ndarray) -> None:
        short = int(images.max()) // 8 + 1 - len(self._bits)
        if short > 0:
            self._bits = np.concatenate(
                [self._bits, np.zeros(min(max(short, len(self._bits)), MAX_IMAGES // 8 - len(self._bits)), np.uint8)]
            )
        np.bitwise_or.at(self._bits, images // 8, np.left_shift(1, images % 8).astype(np.uint8))

    @property
    def n(self) -> int:
        return int(np.bitwise_count(self._bits).sum(dtype=np.int64))


def places_in_runs(entries: np.ndarray, before: int) -> np.ndarray:
    """Return the index of each entry within its run of consecutive entries of one image.

    Args:
        entries: Image of each entry, `(entries,)`.
        before: Number of entries of the first run that come before these.

    Returns:
        The indices, `(entries,)`.
    """
    starts = np.concatenate([[0], (np.diff(entries) != 0).nonzero()[0] + 1])
    lengths = np.diff([*starts, len(entries)])
    place = np.arange(len(entries)) - starts.repeat(lengths)
    place[: lengths[0]] += before
    return place
