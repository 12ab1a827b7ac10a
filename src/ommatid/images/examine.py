"""Examining items: each is read, decoded and becomes a row of the data set, or is refused with a reason."""

import hashlib
import io
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ommatid.images.decode import Unreadable, decode, has_several_frames
from ommatid.images.source import Item

_N_WORKERS = min(os.cpu_count() or 1, 8)
"""Threads: PIL decodes and scales without the interpreter's lock. More than 8 would hold too many large images."""


@dataclass(frozen=True)
class Row:
    """What the table images will hold of one image; see schemas.IMAGES."""

    image_id: str
    path: str
    width: int
    height: int
    label: str | None
    captions: tuple[str, ...]
    taxonomy: str | None
    thumbnail: bytes
    encoded: bytes
    remarks: tuple[str, ...] = ()
    """Keys of `REMARKS` that are true of it; not in the table."""


REMARKS = {
    "n_nearly_black": "nearly black; where they should not be, their values are of another range than the file says: docs/users/images.md",
    "n_nearly_white": "nearly white; where they should not be, their values are of another range than the file says: docs/users/images.md",
    "n_of_several_frames": "of files with several frames or pages, of which only the first is taken",
}
"""Key of the summary that counts such images, and what they are."""
NEARLY = 20
"""Levels of 255 within which a picture's thumbnail is called black, or white: 12 bits in 16 come out at 16 or less."""
STRAY = 0.001
"""Share of the thumbnail's values that may lie outside: hot pixels."""


@dataclass(frozen=True)
class Rejected:
    """A row of the table rejected; see schemas.REJECTED."""

    path: str
    reason: str
    detail: str


def examine(item: Item, thumbnail: int) -> Row | Rejected:
    """Read and decode one item; `thumbnail` is the longest side of its thumbnail in pixels."""
    try:
        encoded = item.read()
        image = decode(encoded)
    except OSError as error:
        return Rejected(item.path, "unreadable", error.strerror or type(error).__name__)
    except Unreadable as error:
        return Rejected(item.path, error.reason, error.detail)
    width, height = image.size
    image_id = hashlib.sha256(encoded).hexdigest()
    small = _webp(image, thumbnail)
    remarks = tuple(_remark(image, encoded))  # on what is a thumbnail by now
    return Row(image_id, item.path, width, height, item.label, item.captions, item.taxonomy, small, encoded, remarks)


def _remark(image: Image.Image, encoded: bytes) -> Iterator[str]:
    levels = np.asarray(image)
    if (levels >= NEARLY).mean() <= STRAY:
        yield "n_nearly_black"
    if (levels <= 255 - NEARLY).mean() <= STRAY:
        yield "n_nearly_white"
    if has_several_frames(encoded):
        yield "n_of_several_frames"


def examine_all(items: Iterable[Item], thumbnail: int) -> Iterator[Row | Rejected]:
    """Examine items in threads, a few ahead of the reader; results come in the order of the items."""
    ahead: deque[Future[Row | Rejected]] = deque()
    with ThreadPoolExecutor(_N_WORKERS) as pool:
        for item in items:
            ahead.append(pool.submit(examine, item, thumbnail))
            if len(ahead) >= 4 * _N_WORKERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _webp(image: Image.Image, longest: int) -> bytes:
    """A thumbnail; scales `image` itself."""
    image.thumbnail((longest, longest))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()
