"""Some images of a split, read and made into pixels again: for what needs the model itself, not only its activations."""

from collections.abc import Collection, Iterator
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


def draw_images(images: Artefact, among: Collection[int], n: int) -> np.ndarray:
    """At most n of these images, ascending (int64), spread evenly over the set and from at most N_BLOCKS row groups."""
    numbers = np.sort(np.fromiter(among, np.int64, len(among)))
    block = np.searchsorted(blocks_of(images)[:, 2].cumsum(), numbers, side="right")  # images are numbered as they lie
    held = np.unique(block)
    numbers = numbers[np.isin(block, held[_spread(len(held), N_BLOCKS)])]
    return numbers[_spread(len(numbers), n)]


def iter_drawn(images: Artefact, drawn: np.ndarray, preprocess: Preprocess, device: str) -> Iterator[Pixels]:
    """The pixels of images that were drawn, in order, BATCH at a time.

    Raises:
        ArtefactError: the images artefact is damaged.
    """
    files = _iter_files(images, drawn)
    batches = (Encoded(numbers, np.zeros(len(numbers), bool), list(islice(files, len(numbers)))) for numbers in _batches(drawn))
    with make_pool(device) as pool:
        yield from iter_pixels(batches, (preprocess,), pool, device)


def _spread(n: int, at_most: int) -> np.ndarray:
    """At most so many of n indices, evenly."""
    return np.linspace(0, n - 1, min(n, at_most)).round().astype(np.int64)


def _batches(drawn: np.ndarray) -> list[np.ndarray]:
    return np.split(drawn, range(BATCH, len(drawn), BATCH)) if len(drawn) else []


def _iter_files(images: Artefact, drawn: np.ndarray) -> Iterator[bytes]:
    parts, start = images.parts("images"), 0
    for file, row_group, n in blocks_of(images).tolist():
        places = drawn[(drawn >= start) & (drawn < start + n)] - start
        if len(places):
            with images.open_part(parts[file]) as part:
                yield from part.read_row_group(row_group, ["encoded"])["encoded"].take(places).to_pylist()
        start += n
