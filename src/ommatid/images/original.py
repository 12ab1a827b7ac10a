"""The file of one image, read from the data set without reading the images around it.

The column `encoded` is plain and not compressed, so that a page of it is the length and the content of each file in turn. Parquet has no
index of the rows in a page: the lengths are walked, which costs a few bytes an image. Pages are not read whole, as sixteen photographs may
share one.
"""

import functools
from dataclasses import dataclass
from typing import Any

from ommatid.errors import ArtefactError, gist
from ommatid.images.reference import load_file
from ommatid.store import Artefact
from ommatid.store.filesystem import Folder

AHEAD = 2**16
"""Bytes of each request while the lengths are walked: many small files, or one length before a large one."""
_FOOTERS_KEPT = 256
"""Number of parts of which the footer is kept."""


@dataclass(frozen=True)
class _Chunk:
    """The column `encoded` in one row group."""

    first: int
    """Row of the part at which it begins."""
    n_rows: int
    start: int
    """Byte of the part at which its pages begin."""


class OriginalReader:
    """Reads image files from a data set.

    Args:
        artefact: The artefact of the stage `images`.
    """

    def __init__(self, artefact: Artefact) -> None:
        self._artefact = artefact
        rows = {file.name: file.rows or 0 for file in artefact.manifest.files}
        self._parts = [(name, rows[name]) for name in artefact.parts("images")]
        self._chunks = functools.lru_cache(_FOOTERS_KEPT)(self._read_chunks)

    def read(self, image: int) -> bytes:
        """Read the file of an image, or the file that the data set refers to, which has not changed.

        The checksum of a file in the data set is not compared; callers compare the content with `image_id`.

        Args:
            image: Number of the image.

        Returns:
            The content of the file.

        Raises:
            ArtefactError: There is no such image, the part that has it is not as the stage writes it, or the file that the data set refers
                to is missing or has changed.
        """
        path = self._artefact.folder.local_path()
        return load_file(self._read_column(image), path and path.absolute().parents[1])

    def _read_column(self, image: int) -> bytes:
        try:
            return self._read(image)
        except (OSError, IndexError, KeyError, TypeError) as error:
            raise ArtefactError(f"{self._artefact.url}: image {image} cannot be read ({gist(error)}); run the stage images again") from None

    def _read(self, row: int) -> bytes:
        image = row
        for name, n_rows in self._parts:
            if 0 <= row < n_rows:
                chunk = next(chunk for chunk in self._chunks(name) if row < chunk.first + chunk.n_rows)
                return _walk(self._artefact.folder, name, chunk.start, row - chunk.first)
            row -= n_rows
        raise ArtefactError(f"{self._artefact.url}: there is no image {image}; it has {sum(n for _, n in self._parts)}")

    def _read_chunks(self, name: str) -> list[_Chunk]:
        with self._artefact.open_part(name) as file:
            found, first = [], 0
            for group in map(file.metadata.row_group, range(file.num_row_groups)):
                columns = [group.column(i) for i in range(group.num_columns)]
                (column,) = [column for column in columns if column.path_in_schema == "encoded"]
                if column.compression != "UNCOMPRESSED" or set(column.encodings) != {"PLAIN", "RLE"}:
                    raise ArtefactError(f"{self._artefact.url}: {name} was not written by the stage images")
                found.append(_Chunk(first, group.num_rows, column.data_page_offset))
                first += group.num_rows
        return found


def _walk(folder: Folder, name: str, start: int, row: int) -> bytes:
    """Read a row of the column, whose pages begin at a byte of a part."""
    window, at = b"", 0

    def read(first: int, n_bytes: int) -> bytes:
        nonlocal window, at
        if not at <= first <= first + n_bytes <= at + len(window):
            window, at = folder.read_range(name, first, first + max(n_bytes, AHEAD)), first
        return window[first - at : first - at + n_bytes]

    while True:
        header, n_header = read_struct(read(start, _LONGEST_HEADER))
        n_values = header[5][1]
        if row < n_values:
            break
        row -= n_values
        start += n_header + header[3]
    place = start + n_header
    for _ in range(row):
        place += 4 + int.from_bytes(read(place, 4), "little")
    length = int.from_bytes(read(place, 4), "little")
    return bytes(read(place + 4, length))


_LONGEST_HEADER = 256
"""More bytes than a page's header has, which is about 25, as no statistics are written for the column."""


def read_struct(data: bytes, place: int = 0) -> tuple[dict[int, Any], int]:
    """Read a struct in Thrift's compact protocol, in which Parquet writes the header of a page.

    Args:
        data: Bytes that hold the struct.
        place: Where it begins.

    Returns:
        Its integers and inner structs by the number of the field, and where it ends.

    Raises:
        ArtefactError: It has a field of another type, which no header of a page without statistics has.
    """
    found: dict[int, Any] = {}
    number = 0
    while kind := data[place]:
        place += 1
        number, place = (number + (kind >> 4), place) if kind >> 4 else _read_int(data, place)
        match kind & 15:
            case 1 | 2:
                found[number] = int(kind & 15 == 1)
            case 4 | 5 | 6:
                found[number], place = _read_int(data, place)
            case 12:
                found[number], place = read_struct(data, place)
            case other:
                raise ArtefactError(f"a page of images has a header with a field of type {other}, which the stage images does not write")
    return found, place + 1


def _read_int(data: bytes, place: int) -> tuple[int, int]:
    """Read a zigzag integer of variable length, and return where it ends."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return (value >> 1) ^ -(value & 1), place
