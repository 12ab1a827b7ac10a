"""Samples of an existing images artefact, each an images artefact of its own."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from ommatid import store
from ommatid.images.dataset import PARQUET
from ommatid.images.source import spread
from ommatid.schemas import IMAGES, REJECTED
from ommatid.store import Artefact, part_name
from ommatid.summaries import ImagesSummary

_PER_GROUP = 16
"""Maximum number of images taken from one row group if there are enough groups, so that the sample spreads over the data set."""
_PER_PART = 512
"""Number of images in a part of the sample, which are held in memory at once."""


def draw_images(images: Artefact, n: int, place: Path) -> Artefact:
    """Make an images artefact from `n` images, evenly spread over a data set. They keep their numbers and splits.

    Args:
        images: The data set.
        n: Number of images, at most that of the data set.
        place: Folder of the sample.

    Returns:
        The published sample.
    """
    splits: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    with store.open_draft(place, "images", {"sample": n}, {"images": images}) as draft:
        for index, rows in enumerate(_iter_parts(_iter_rows(images, n))):
            draft.write_table(part_name("images", index), rows, **PARQUET)
            splits.update(rows["split"].to_pylist())
            labels.update(label for label in rows["label"].to_pylist() if label is not None)
        draft.write_table("rejected.parquet", REJECTED.empty_table())
        draft.seal(_summary(splits, labels))
        return draft.publish(place)


def _iter_rows(images: Artefact, n: int) -> Iterator[pa.Table]:
    """Yield `n` evenly spread rows, from row groups that are evenly spread over the data set."""
    groups = [
        (name, group, size)
        for name, sizes in zip(images.parts("images"), images.row_groups("images"), strict=True)
        for group, size in enumerate(sizes)
    ]
    total = sum(size for _, _, size in groups)
    n_groups = min(len(groups), max(-(-n // _PER_GROUP), -(-n * len(groups) // total)))
    remaining = n
    chosen = [groups[i] for i in spread(len(groups), n_groups)]
    for i, (name, group, size) in enumerate(chosen):
        n_rows = min(size, -(-remaining // (len(chosen) - i)))
        with images.open_part(name) as file:
            yield file.read_row_group(group).take(list(spread(size, n_rows)))
        remaining -= n_rows


def _iter_parts(pieces: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Join tables until a part is full."""
    collected: list[pa.Table] = []
    for piece in pieces:
        collected.append(piece.cast(IMAGES))
        if sum(map(len, collected)) >= _PER_PART:
            yield pa.concat_tables(collected)
            collected = []
    if collected:
        yield pa.concat_tables(collected)


def _summary(splits: Counter[str], labels: Counter[str]) -> ImagesSummary:
    n = splits.total()
    return ImagesSummary(
        n_seen=n,
        n_images=n,
        n_train=splits["train"],
        n_eval=splits["eval"],
        n_duplicates=0,
        n_rejected=0,
        rejected_share=0.0,
        labels=dict(sorted(labels.items())),
    )
