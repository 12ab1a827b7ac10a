"""Some images of a split, read and made into pixels again: for what needs the model itself, not only its activations."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ommatid.extract.loader import Encoded, Pixels, iter_pixels, make_pool
from ommatid.extract.plan import blocks_of
from ommatid.store import Artefact
from ommatid.vlm.preprocess import Preprocess

BATCH = 64
"""Images a forward pass."""
N_BLOCKS = 256
"""Row groups of the images artefact that are read, at most: of a million images not all for a thousand of them."""


@dataclass(frozen=True)
class Drawn:
    """Images to read, as they lie in the images artefact."""

    numbers: np.ndarray
    """images.image, (images,)."""
    rows: np.ndarray
    """Their places in the table, ascending, (images,) int64."""


def draw_images(images: Artefact, among: Collection[int], n: int) -> Drawn:
    """At most n of these images, spread evenly over the set, from at most N_BLOCKS row groups."""
    numbers = images.read("images", ["image"])["image"].to_numpy()
    rows = np.flatnonzero(np.isin(numbers, np.fromiter(among, np.int64, len(among))))
    block = np.searchsorted(blocks_of(images)[:, 2].cumsum(), rows, side="right")
    held = np.unique(block)
    rows = rows[np.isin(block, held[_spread(len(held), N_BLOCKS)])]
    rows = rows[_spread(len(rows), n)]
    return Drawn(numbers[rows], rows)


def iter_drawn(images: Artefact, drawn: Drawn, preprocess: Preprocess, device: str) -> Iterator[Pixels]:
    """The pixels of images that were drawn, in order, BATCH at a time.

    Raises:
        ArtefactError: the images artefact is damaged.
    """
    files = _iter_files(images, drawn.rows)
    starts = range(0, len(drawn.numbers), BATCH)
    batches = (_encoded(drawn.numbers[start : start + BATCH], files) for start in starts)
    with make_pool(device) as pool:
        yield from iter_pixels(batches, (preprocess,), pool, device)


def _encoded(numbers: np.ndarray, files: Iterator[bytes]) -> Encoded:
    return Encoded(numbers, np.zeros(len(numbers), dtype=bool), list(islice(files, len(numbers))))


def _spread(n: int, at_most: int) -> np.ndarray:
    """At most so many of n indices, evenly."""
    return np.linspace(0, n - 1, min(n, at_most)).round().astype(np.int64)


def _iter_files(images: Artefact, rows: np.ndarray) -> Iterator[bytes]:
    parts, start = images.parts("images"), 0
    for file, row_group, n in blocks_of(images).tolist():
        places = rows[(rows >= start) & (rows < start + n)] - start
        if len(places):
            with images.open_part(parts[file]) as part:
                yield from part.read_row_group(row_group, ["encoded"])["encoded"].take(places).to_pylist()
        start += n
