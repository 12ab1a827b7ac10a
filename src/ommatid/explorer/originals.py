"""The images as they were read from the source, from the artefact of the stage `images`, for pages that show them large.

The artefact may lack: a catalogue can be looked at alone. Libraries that read it are imported when the first image is asked for.
"""

import hashlib
import io
import math
import re
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ommatid.errors import ArtefactError

if TYPE_CHECKING:
    from ommatid.images.original import OriginalReader

KEPT_BYTES = 64 * 2**20
"""Bytes of images that are kept in memory, the least recently asked for first to go."""
LONGEST = 4096
"""Longest side, in pixels, of an image that is encoded anew because browsers do not show its format."""

_SHOWN = {
    rb"\xff\xd8\xff": "image/jpeg",
    rb"\x89PNG": "image/png",
    rb"GIF8": "image/gif",
    rb"RIFF....WEBP": "image/webp",
    rb"....ftypavi[fs]": "image/avif",
    rb"BM": "image/bmp",
    rb"\0\0\x01\0": "image/x-icon",
}
"""Content types of the formats that browsers show, by their first bytes."""


class Originals:
    """Reads images for pages, and keeps some.

    Args:
        data: Root of the study's artefacts, a path or URL.
    """

    def __init__(self, data: str) -> None:
        self._data = data
        self._lock = threading.Lock()
        self._one_at_a_time = threading.Lock()
        self._kept: OrderedDict[str, tuple[bytes, str]] = OrderedDict()
        self._reader: OriginalReader | None = None
        self._digest = ""
        self._were_at_hand, self._looked = False, -math.inf

    @property
    def are_at_hand(self) -> bool:
        """Whether the artefact seems to be there; nobody asks an object store for that."""
        return "://" in self._data or (Path(self._data) / "images" / "manifest.json").exists()

    @property
    def were_at_hand(self) -> bool:
        """Whether the artefact seemed to be there a second ago at most, for the many links of a page."""
        if time.monotonic() > self._looked + 1:
            self._were_at_hand, self._looked = self.are_at_hand, time.monotonic()
        return self._were_at_hand

    def get(self, image: int, hash_: str) -> tuple[bytes, str]:
        """Return an image.

        Args:
            image: Number of the image.
            hash_: Beginning of its checksum, `image_id`, in the catalogue.

        Returns:
            Its file in a format that browsers show, and the content type of that.

        Raises:
            ArtefactError: The artefact is missing, is damaged or holds another image of this number, or browsers and Pillow cannot show it.
        """
        key = f"{image}/{hash_}"
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        found = self._show(self._read(image, hash_))
        with self._lock:
            self._kept[key] = found
            while sum(len(content) for content, _ in self._kept.values()) > KEPT_BYTES:
                self._kept.popitem(last=False)
        return found

    def _read(self, image: int, hash_: str) -> bytes:
        reader = self._open()
        found = reader.read(image)
        if hashlib.sha256(found).hexdigest()[: len(hash_)] != hash_:
            raise ArtefactError(f"{self._data}/images holds another image {image} than this catalogue, which was built from other images.")
        return found

    def _open(self) -> "OriginalReader":
        """Open the artefact, or open it anew if it was replaced."""
        from ommatid.images.original import OriginalReader
        from ommatid.pipeline import open_stage, place_of
        from ommatid.store import MANIFEST

        if not self.are_at_hand:
            raise ArtefactError(f"The images are not in {self._data}/images; the catalogue has thumbnails alone.")
        with self._lock:
            digest = hashlib.sha256(place_of("images", self._data).read_bytes(MANIFEST)).hexdigest()
            if self._reader is None or digest != self._digest:
                self._reader, self._digest = OriginalReader(open_stage("images", data=self._data)), digest
            return self._reader

    def _show(self, encoded: bytes) -> tuple[bytes, str]:
        for signature, type_ in _SHOWN.items():
            if re.match(signature, encoded[:16], re.DOTALL):
                return encoded, type_
        from ommatid.images.decode import Unreadable, decode

        with self._one_at_a_time:  # as the pixels of one may take hundreds of megabytes
            try:
                image: Any = decode(encoded)
            except Unreadable as error:
                raise ArtefactError(f"The image cannot be decoded any more: {error}.") from None
            image.thumbnail((LONGEST, LONGEST))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=92)
        return buffer.getvalue(), "image/jpeg"
