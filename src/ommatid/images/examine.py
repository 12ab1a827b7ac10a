"""Examination of the items of a source: each becomes a row of the data set, or is rejected with a reason."""

import hashlib
import io
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ommatid.errors import ArtefactError
from ommatid.images import decode
from ommatid.images.decode import Unreadable, decode_thumbnail, has_several_frames
from ommatid.images.memory import Memory, Seen
from ommatid.images.original import OriginalReader
from ommatid.images.source import Item
from ommatid.store import open_artefact
from ommatid.store.code import digest_of
from ommatid.store.filesystem import Folder

_N_WORKERS = min(os.cpu_count() or 1, 8)
"""Number of threads, which PIL lets decode and scale in parallel. More than 8 would hold too many large images in memory."""
_N_AHEAD = 32
"""Number of items that are examined ahead of the consumer, enough for the threads to go on while a part is written."""
_N_REMOTE = 8
"""Number of threads if the source is behind a URL, where they mostly wait for its answers."""


@dataclass(frozen=True)
class Row:
    """A row of the table `images`, whose columns `schemas.IMAGES` describes."""

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
    """Keys of `REMARKS` that apply to the image; not a column of the table."""


REMARKS = {
    "n_nearly_black": "nearly black; if they should not be, their values have another range than the file says: see docs/users/images.md",
    "n_nearly_white": "nearly white; if they should not be, their values have another range than the file says: see docs/users/images.md",
    "n_of_several_frames": "from files with several frames or pages, of which only the first is used",
}
"""Properties of images that users should know of, by the key of the summary that counts them; each continues "3 images are ..."."""
NEARLY = 20
"""Distance from black (0) or white (255) within which a thumbnail counts as nearly so. 12-bit values stored in 16 bits stay below 17."""
STRAY = 0.001
"""Share of the thumbnail's values that may lie outside that distance, to allow for hot pixels."""


@dataclass(frozen=True)
class Rejected:
    """A row of the table `rejected`, whose columns `schemas.REJECTED` describes."""

    path: str
    reason: str
    detail: str


def look(encoded: bytes, thumbnail: int) -> Seen | Unreadable:
    """Decode an image file.

    Args:
        encoded: Content of the file.
        thumbnail: Longest side of its thumbnail, in pixels.

    Returns:
        What the content determines of the image's row, or why it cannot be decoded.

    Raises:
        Unreadable: It could not be decoded this time, for lack of memory.
    """
    try:
        image, (width, height) = decode_thumbnail(encoded, thumbnail)
    except Unreadable as error:
        if error.is_lasting:
            return error
        raise
    return Seen(width, height, to_webp(image), tuple(_iter_remarks(image, encoded)))


def _iter_remarks(image: Image.Image, encoded: bytes) -> Iterator[str]:
    """Iterate over the keys of `REMARKS` that apply to an image, given its thumbnail and its file."""
    levels = np.asarray(image)
    if (levels >= NEARLY).mean() <= STRAY:
        yield "n_nearly_black"
    if (levels <= 255 - NEARLY).mean() <= STRAY:
        yield "n_nearly_white"
    if has_several_frames(encoded):
        yield "n_of_several_frames"


def to_webp(image: Image.Image) -> bytes:
    """Return an image as WebP without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()


def settings_of(thumbnail: int) -> str:
    """Return a text that identifies everything besides an image's content that determines what `look` finds."""
    return f"{thumbnail} {decode.versions()} {digest_of(__name__, decode.__name__)}"


class Earlier:
    """The artefact that is about to be replaced, from which the bytes of images are copied that it holds already.

    Nothing is copied from an object store: one image at a time, that is no faster than reading the source.

    Args:
        place: Where the artefact is, or would be.
    """

    def __init__(self, place: Folder):
        self._rows: dict[bytes, int] = {}
        if not place.is_local:
            return
        try:
            artefact = open_artefact(place, "images")
            self._reader = OriginalReader(artefact)
            for batch in artefact.iter_batches("images", ["image_id"], n_rows=2**16):
                start = len(self._rows)
                self._rows |= {bytes.fromhex(image_id): start + i for i, image_id in enumerate(batch["image_id"].to_pylist())}
        except ArtefactError:  # There is none, or it is damaged.
            self._rows = {}

    @property
    def image_ids(self) -> Iterator[str]:
        """The sha256 of each of its images."""
        return (image_id.hex() for image_id in self._rows)

    def read(self, image_id: str) -> bytes | None:
        """Return the file with this sha256, or None if the artefact does not hold it undamaged."""
        row = self._rows.get(bytes.fromhex(image_id))
        try:
            found = None if row is None else self._reader.read(row)
        except ArtefactError:
            return None
        return found if found is not None and hashlib.sha256(found).hexdigest() == image_id else None


@dataclass(frozen=True)
class Examiner:
    """Examines items, of which it reads and decodes those that are new."""

    thumbnail: int
    """Longest side of thumbnails, in pixels."""
    memory: Memory
    """What earlier runs found."""
    earlier: Earlier
    """The artefact that is about to be replaced."""
    by_reference: bool = False
    """Whether rows refer to files instead of holding their content."""
    is_remote: bool = False
    """Whether the source is behind a URL."""

    def examine(self, item: Item) -> Row | Rejected:
        """Return the row of an item, or the reason why it is rejected. May be called from several threads."""
        try:
            image_id, seen, encoded = self._see(item)
        except OSError as error:  # Not remembered: the next attempt may succeed.
            return Rejected(item.path, "unreadable", error.strerror or type(error).__name__)
        except Unreadable as error:
            return Rejected(item.path, error.reason, error.detail)
        if self.by_reference:
            assert item.reference, item.path
            size = item.reference.size if encoded is None else len(encoded)
            encoded = replace(item.reference, size=size, sha256=image_id).dump()
        assert encoded is not None
        found = seen.width, seen.height, item.label, item.captions, item.taxonomy, seen.thumbnail
        return Row(image_id, item.path, *found, encoded, seen.remarks)

    def _see(self, item: Item) -> tuple[str, Seen, bytes | None]:
        """Return the sha256 of an item's file, what is seen in it, and its content, unless that need not be read."""
        known = self.memory.content_of(item.token)
        seen = self.memory.find(known) if known else None
        if isinstance(seen, Unreadable):
            raise seen
        if known and seen and self.by_reference:
            return known, seen, None
        image_id, encoded = self._load(item, known)
        if image_id != known:
            seen = self.memory.find(image_id)
        new = look(encoded, self.thumbnail) if seen is None else None
        self.memory.add(item.token if image_id != known and item.is_unchanged() else "", image_id, new)
        seen = seen or new
        if not isinstance(seen, Seen):
            assert seen
            raise seen
        return image_id, seen, encoded

    def _load(self, item: Item, known: str | None) -> tuple[str, bytes]:
        """Return the sha256 and the content of an item's file, which is only read if its content is not known, or not at hand."""
        if known and (encoded := self.earlier.read(known)):
            return known, encoded
        encoded = item.read()
        return hashlib.sha256(encoded).hexdigest(), encoded

    def examine_all(self, items: Iterable[Item]) -> Iterator[Row | Rejected]:
        """Examine items in threads, a few ahead of the consumer, and yield the results in the order of the items."""
        ahead: deque[Future[Row | Rejected]] = deque()
        n_threads = _N_REMOTE if self.is_remote else _N_WORKERS
        with ThreadPoolExecutor(n_threads) as pool:
            for item in items:
                ahead.append(pool.submit(self.examine, item))
                if len(ahead) >= _N_AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
