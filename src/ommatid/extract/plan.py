"""The plan of an extraction: which images each shard holds. Made first; every worker reads its own lines of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ommatid import schemas
from ommatid.store import Artefact

IMAGES_PER_SHARD = 8192
"""Enough that a batch of 2,048 tokens finds as many different training images in one shard."""
SEED = 0
"""The order of blocks and rows is a function of the data alone."""


@dataclass(frozen=True)
class Block:
    """Consecutive images that are read together: a row group of the images artefact."""

    file: int
    """Index of the file in the artefact's table `images`."""
    row_group: int
    """Index of the row group in the file."""
    n_images: int
    """Images in it."""


@dataclass(frozen=True)
class Run:
    """Consecutive images of a block."""

    block: Block
    start: int
    n_images: int


def divide(blocks: Sequence[Block], images_per_chunk: int) -> list[list[Run]]:
    """Chunks of so many images at most, in order."""
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
    """Deal blocks to shards at random, so that a shard is a sample of the whole set whatever order the images have.

    Within a shard blocks stay in the order of the images. Shards have nearly as many images as one another.

    Args:
        blocks: A row a block, in the order of the images, with the fields of `Block`: (blocks, 3) int32.

    Returns:
        `schemas.PLAN`, ordered by shard.
    """
    order = np.random.default_rng(SEED).permutation(len(blocks))
    n_images = blocks[order, 2].astype(np.int64)
    total = int(n_images.sum())
    n_shards = max(1, min(len(blocks), -(-total // IMAGES_PER_SHARD)))
    middle = n_images.cumsum() - n_images // 2
    shard = np.minimum(middle * n_shards // max(1, total), n_shards - 1)
    shard = (np.diff(shard, prepend=shard[:1]) > 0).cumsum()  # a large block can leave a shard without any
    ordered = order[np.lexsort((order, shard))]
    columns = [np.sort(shard), *blocks[ordered].T]
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, schemas.PLAN, strict=True)], schema=schemas.PLAN)


def blocks_of(images: Artefact) -> np.ndarray:
    """The row groups of the images artefact, in order: (blocks, 3) int32 as `make_plan` takes them."""
    rows = [(file, group, n) for file, sizes in enumerate(images.row_groups("images")) for group, n in enumerate(sizes)]
    return np.array(rows, dtype=np.int32).reshape(-1, 3)


def shard_blocks(plan: pa.Table) -> Sequence[Block]:
    """The blocks of one shard's lines of the plan."""
    columns = (plan[name].to_pylist() for name in ("file", "row_group", "n_images"))
    return [Block(*values) for values in zip(*columns, strict=True)]
