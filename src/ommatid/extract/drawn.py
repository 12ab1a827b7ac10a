"""Images drawn from the images artefact, and their pixels."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from jaxtyping import Int, Int64

from ommatid.compute.evenly import spread_evenly
from ommatid.extract.plan import blocks_of
from ommatid.images.loader import Encoded, Pixels, iter_pixels, make_pool
from ommatid.store import Artefact
from ommatid.vlm.preprocess import Preprocess

BATCH = 64
"""Number of images in a forward pass."""
N_BLOCKS = 256
"""Maximum number of row groups of the images artefact to read, so that a draw of a thousand does not read a million images."""


@dataclass(frozen=True)
class DrawnImages:
    """Images drawn from the images artefact."""

    numbers: Int[np.ndarray, " images"]
    """Number of each image (`images.image`), (images,)."""
    rows: Int64[np.ndarray, " images"]
    """Row of each image in the table `images`, ascending, (images,) int64."""


def draw_images(images: Artefact, among: Collection[int], n: int) -> DrawnImages:
    """Draw up to `n` of the images in `among`, spread evenly over the table, from at most N_BLOCKS row groups."""
    numbers = images.read("images", ["image"])["image"].to_numpy()
    rows = np.flatnonzero(np.isin(numbers, np.fromiter(among, np.int64, len(among))))
    block = np.searchsorted(blocks_of(images)[:, 2].cumsum(), rows, side="right")
    held = np.unique(block)
    rows = rows[np.isin(block, held[spread_evenly(len(held), N_BLOCKS)])]
    rows = rows[spread_evenly(len(rows), n)]
    return DrawnImages(numbers[rows], rows)


def iter_drawn_pixels(images: Artefact, drawn: DrawnImages, preprocess: Preprocess, device: str) -> Iterator[Pixels]:
    """Iterate over the pixels of drawn images.

    Yields:
        Batches of up to BATCH images, in the order of the draw.

    Raises:
        ArtefactError: The images artefact is damaged.
    """
    files = _iter_files(images, drawn.rows)
    starts = range(0, len(drawn.numbers), BATCH)
    batches = (_encoded(drawn.numbers[start : start + BATCH], files) for start in starts)
    with make_pool(device) as pool:
        yield from iter_pixels(batches, (preprocess,), pool, device)


def _encoded(numbers: np.ndarray, files: Iterator[bytes]) -> Encoded:
    return Encoded(numbers, np.zeros(len(numbers), dtype=bool), list(islice(files, len(numbers))))


def _iter_files(images: Artefact, rows: np.ndarray) -> Iterator[bytes]:
    parts, start = images.parts("images"), 0
    for file, row_group, n in blocks_of(images).tolist():
        places = rows[(rows >= start) & (rows < start + n)] - start
        if len(places):
            with images.open_part(parts[file]) as part:
                yield from part.read_row_group(row_group, ["encoded"])["encoded"].take(places).to_pylist()
        start += n
