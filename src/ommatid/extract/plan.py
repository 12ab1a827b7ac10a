"""The plan of an extraction: which images each shard holds. It is made first, and workers read the rows of their shards from it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ommatid import schemas
from ommatid.store import Artefact

IMAGES_PER_SHARD = 8192
"""Number of images per shard: enough for the tokens of a batch of 2,048 to come from as many different training images of one shard."""
SEED = 0
"""Seed of the order of blocks and rows. It is fixed, so that the order depends on the data alone."""


@dataclass(frozen=True)
class ImageBlock:
    """Consecutive images that are read together: a row group of the images artefact."""

    file: int
    """Index of the file in the artefact's table `images`."""
    row_group: int
    """Index of the row group in the file."""
    n_images: int
    """Number of images in the block."""


@dataclass(frozen=True)
class Run:
    """Consecutive images within a block."""

    block: ImageBlock
    """The block that holds them."""
    start: int
    """Index of the first image in the block."""
    n_images: int
    """Number of images."""


def divide(blocks: Sequence[ImageBlock], images_per_chunk: int) -> list[list[Run]]:
    """Divide blocks, in order, into chunks of at most `images_per_chunk` images."""
    chunks: list[list[Run]] = [[]]
    room = images_per_chunk
    for block in blocks:
        start = 0
        while start < block.n_images:
            if not room:
                chunks.append([])
                room = images_per_chunk
            n = min(room, block.n_images - start)
            chunks[-1].append(Run(block, start, n))
            start, room = start + n, room - n
    return chunks


def make_plan(blocks: np.ndarray) -> pa.Table:
    """Deal blocks to shards at random, so that each shard is a sample of the whole set, whatever the order of the images.

    Within a shard, blocks stay in the order of the images. All shards have nearly the same number of images.

    Args:
        blocks: The fields of an `ImageBlock` in each row, in the order of the images, `(blocks, 3)` int32.

    Returns:
        The plan, a table with the schema `schemas.PLAN`, ordered by shard.
    """
    order = np.random.default_rng(SEED).permutation(len(blocks))
    n_images = blocks[order, 2].astype(np.int64)
    total = int(n_images.sum())
    n_shards = max(1, min(len(blocks), -(-total // IMAGES_PER_SHARD)))
    middle = n_images.cumsum() - n_images // 2
    shard = np.minimum(middle * n_shards // max(1, total), n_shards - 1)
    shard = (np.diff(shard, prepend=shard[:1]) > 0).cumsum()  # Renumbered, because a large block can leave a shard empty.
    ordered = order[np.lexsort((order, shard))]
    columns = [np.sort(shard), *blocks[ordered].T]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, schemas.PLAN, strict=True)], schema=schemas.PLAN)


def blocks_of(images: Artefact) -> np.ndarray:
    """Return the row groups of the images artefact in order, in the form that `make_plan` takes, `(blocks, 3)` int32."""
    rows = [(file, group, n) for file, sizes in enumerate(images.row_groups("images")) for group, n in enumerate(sizes)]
    return np.array(rows, dtype=np.int32).reshape(-1, 3)


def shard_blocks(plan: pa.Table) -> Sequence[ImageBlock]:
    """Return the blocks of one shard from its rows of the plan."""
    columns = (plan[name].to_pylist() for name in ("file", "row_group", "n_images"))
    return [ImageBlock(*values) for values in zip(*columns, strict=True)]
