"""Stores of rows of bytes by 32-byte keys, in append-only files that many processes may write, read and remove at once.

A segment is a file of rows that were written together: magic, number and width of the rows, keys, CRC-32 of each row, CRC-32 of all that,
and then the rows. It appears whole, by renaming, and never changes. Its time of change records when it was last used. A row may be in
several segments, and is the same in all of them.
"""

import os
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ommatid.store.caches import files_below
from ommatid.store.filesystem import nearest_folder, temporary_path

KEY = 32
"""Bytes of a key."""
MAGIC = b"ommatid rows 1\n\0"
_HEADER = struct.Struct("<16sQQ")
SUFFIX = ".rows"
SMALL = 2**22
"""Bytes below which a segment counts as small."""
MANY = 32
"""Number of small segments of a store that are merged into one."""
AT_ONCE = 2**27
"""Bytes that a process writes at most before it looks again at what all have written, so that eight together exceed the bound by less than
1 GiB."""


def as_keys(digests: Sequence[str]) -> np.ndarray:
    """Return sha256 digests in hex as an array of keys, `(n,)` of dtype S32."""
    return np.frombuffer(bytes.fromhex("".join(digests)), dtype=f"S{KEY}")


@dataclass(frozen=True)
class _Segment:
    """A segment whose header was read."""

    path: Path
    n_rows: int
    keys: np.ndarray
    sums: np.ndarray


class Damaged(Exception):
    """A segment is not as it was written."""


class RowStore:
    """The rows of one width in one folder."""

    def __init__(self, folder: Path, width: int, on_notice: Callable[[str], None] = lambda line: None) -> None:
        """Open a store, whose folder need not exist.

        Args:
            folder: Folder of the segments.
            width: Bytes per row.
            on_notice: Called with a line about each segment that is damaged and removed, or that cannot be read.
        """
        self.folder = folder
        self.width = width
        self._on_notice = on_notice
        self._segments: dict[str, _Segment] = {}
        self._used: set[str] = set()
        self._index()
        self.refresh()

    def refresh(self) -> None:
        """Look for segments that other processes have written or removed."""
        with suppress(OSError):
            present = {path.name for path in self.folder.iterdir() if path.name.endswith(SUFFIX)}
            if present == self._segments.keys():
                return
            for name in self._segments.keys() - present:
                del self._segments[name]
            for name in present - self._segments.keys():
                self._open(self.folder / name)
            self._index()

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Return whether each key has a row, `(n,)` bool, and record the use of their segments."""
        segments, _ = self._find(keys)
        for i in np.unique(segments[segments >= 0]):
            self._touch(self._names[i])
        return segments >= 0

    def read(self, keys: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Read rows.

        Args:
            keys: Keys of the rows, `(n,)`.
            out: Array into which they are read, `(n, width)` uint8.

        Returns:
            Whether each row was found undamaged and read, `(n,)` bool.
        """
        found = np.zeros(len(keys), dtype=bool)
        segments, rows = self._find(keys)
        for i in np.unique(segments[segments >= 0]):
            places = np.flatnonzero(segments == i)
            name = self._names[i]
            self._touch(name)
            try:
                for place, data in _iter_rows(self._segments[name], places, rows[places], self.width):
                    out[place] = data
                    found[place] = True
                if not found[places].all():
                    self._rescue(name)
            except FileNotFoundError:  # Another process removed it, to make room or to merge it.
                self._drop(name)
            except OSError as error:
                self._leave_out(name, error)
        if len(self._segments) != len(self._names):
            self._index()
            again = np.flatnonzero(~found)  # their twins may be in another segment, such as the one into which they were merged
            rows = np.empty((len(again), self.width), np.uint8)
            found[again] = is_there = self.read(keys[again], rows)
            out[again[is_there]] = rows[is_there]
        return found

    def write(self, keys: Sequence[np.ndarray], rows: Sequence[np.ndarray]) -> int:
        """Write a segment of several blocks of rows.

        Args:
            keys: Keys of each block, `(n,)`.
            rows: Rows of each block, `(n, width)` uint8.

        Returns:
            The bytes of the segment.

        Raises:
            OSError: The disk is full or cannot be written.
        """
        every = np.concatenate(keys)
        sums = np.array([zlib.crc32(row) for block in rows for row in np.ascontiguousarray(block)], dtype="<u4")
        head = _HEADER.pack(MAGIC, len(every), self.width) + every.tobytes() + sums.tobytes()
        path = self.folder / f"{time.time_ns():x}-{os.getpid()}-{threading.get_native_id()}{SUFFIX}"
        temporary = temporary_path(path)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(head + struct.pack("<I", zlib.crc32(head)))
                for block in rows:
                    file.write(np.ascontiguousarray(block).data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return _size(len(every), self.width)  # not looked up, as another process may have merged it already

    def merge(self) -> None:
        """Merge small segments into one if there are many. Others may do so at the same time: a row that is there twice does no harm.

        Raises:
            OSError: The disk is full or cannot be written.
        """
        self.refresh()
        small = [s for s in self._segments.values() if _size(s.n_rows, self.width) < SMALL]
        if len(small) < MANY:
            return
        keys, first = np.unique(np.concatenate([s.keys for s in small]), return_index=True)
        keys = np.concatenate([s.keys for s in small])[np.sort(first)]
        rows = np.empty((len(keys), self.width), np.uint8)
        found = self.read(keys, rows)
        self.write([keys[found]], [rows[found]])
        for segment in small:
            if segment.path.name in self._segments:  # all of its rows were read
                segment.path.unlink(missing_ok=True)
        self.refresh()

    def _open(self, path: Path) -> None:
        try:
            self._segments[path.name] = _read_header(path, self.width)
        except FileNotFoundError:
            return
        except OSError as error:
            self._leave_out(path.name, error)
        except Damaged as error:
            self._discard(path.name, error)

    def _rescue(self, name: str) -> None:
        """Write the rows of a damaged segment that fit their checksums anew, and remove it.

        Raises:
            OSError: The disk is full or cannot be written.
        """
        segment, rows = self._segments[name], np.empty((self._segments[name].n_rows, self.width), np.uint8)
        every = np.arange(segment.n_rows)
        whole = []
        for place, data in _iter_rows(segment, every, every, self.width):
            rows[place] = data
            whole.append(place)
        if whole:
            self.write([segment.keys[whole]], [rows[whole]])
        self._discard(name, Damaged(f"{segment.n_rows - len(whole)} of {segment.n_rows} rows do not fit their checksums"))

    def _discard(self, name: str, error: Exception) -> None:
        self._on_notice(f"{self.folder / name}: damaged ({error}); it is removed, and what it held is computed again")
        with suppress(OSError):
            (self.folder / name).unlink(missing_ok=True)
        self._drop(name)

    def _leave_out(self, name: str, error: OSError) -> None:
        """Do without a segment that cannot be read now, such as on a file system that does not answer; others may be able to read it."""
        self._on_notice(f"{self.folder / name}: cannot be read ({error}); what it holds is computed again")
        self._drop(name)

    def _drop(self, name: str) -> None:
        self._segments.pop(name, None)

    def _touch(self, name: str) -> None:
        """Record the use of a segment, once per process."""
        if name not in self._used:
            self._used.add(name)
            with suppress(OSError):
                os.utime(self.folder / name)

    def _index(self) -> None:
        """Sort the keys of all segments."""
        self._names = list(self._segments)
        segments = [self._segments[name] for name in self._names]
        keys = np.concatenate([np.empty(0, f"S{KEY}"), *(s.keys for s in segments)])
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        counts = [s.n_rows for s in segments]
        self._segment_of = np.arange(len(segments)).repeat(counts)[order]
        self._row_of = np.concatenate([np.empty(0, np.int64), *map(np.arange, counts)]).astype(np.int64)[order]

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the segment and the row of each key, `(n,)`; -1 for keys that are not there."""
        if not len(self._keys):
            missing = np.full(len(keys), -1)
            return missing, missing
        places = np.searchsorted(self._keys, keys).clip(0, len(self._keys) - 1)
        is_there = self._keys[places] == keys
        return np.where(is_there, self._segment_of[places], -1), self._row_of[places]


@dataclass
class Space:
    """The space that the segments below a folder may take."""

    folder: Path
    """Folder of all stores."""
    bound: float
    """Largest number of bytes."""
    started: float
    """Time at which the run began; segments that were used since are not removed."""
    reserve: float = 0.0
    """Bytes of the disk that are left free."""
    _free: float = -1.0

    def admit(self, n_bytes: int) -> bool:
        """Make room for a new segment by removing those that were not used for longest.

        Returns:
            Whether there is room; False if all that is left was used since the run began, or if the disk is too full.

        Raises:
            OSError: The disk does not answer.
        """
        if shutil.disk_usage(nearest_folder(self.folder)).free - n_bytes < self.reserve:
            return False
        if self._free < n_bytes:
            self._make_room(n_bytes)
        if self._free < n_bytes:
            return False
        self._free -= n_bytes
        return True

    def _make_room(self, n_bytes: int) -> None:
        entries = sorted(files_below(self.folder), key=lambda entry: entry.used)
        free = self.bound - sum(entry.bytes for entry in entries)
        share = max(n_bytes, min(self.bound / 20, AT_ONCE))
        if free < n_bytes:
            for entry in entries:
                if free >= share or entry.used >= self.started:
                    break
                if entry.path.name.endswith(SUFFIX):
                    free += entry.remove()
        self._free = min(free, share)


def _iter_rows(segment: _Segment, places: np.ndarray, rows: np.ndarray, width: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the place and the content of each row that fits its checksum, reading rows that lie side by side at once."""
    order = np.argsort(rows, kind="stable")
    places, rows = places[order], rows[order]
    most = max(1, SMALL // width)
    with segment.path.open("rb", buffering=0) as file:
        start = 0
        while start < len(rows):
            end = start + 1
            while end < len(rows) and end - start < most and rows[end] == rows[end - 1] + 1:
                end += 1
            data = np.empty((end - start, width), np.uint8)
            file.seek(_offset(segment.n_rows) + int(rows[start]) * width)
            n_read = (file.readinto(data.data) or 0) // width
            for place, row, content in zip(places[start:][:n_read], rows[start:], data[:n_read], strict=False):
                if zlib.crc32(content) == segment.sums[row]:
                    yield int(place), content
            start = end


def _read_header(path: Path, width: int) -> _Segment:
    with path.open("rb") as file:
        begin = file.read(_HEADER.size)
        if len(begin) < _HEADER.size:
            raise Damaged("its header is too short")
        magic, n_rows, found = _HEADER.unpack(begin)
        size = os.fstat(file.fileno()).st_size
        if magic != MAGIC or found != width or size != _size(n_rows, width):
            raise Damaged("its header or its size is wrong")
        rest = file.read(n_rows * (KEY + 4) + 4)
    if zlib.crc32(begin + rest[:-4]) != struct.unpack("<I", rest[-4:])[0]:
        raise Damaged("the checksum of its header differs")
    keys = np.frombuffer(rest, dtype=f"S{KEY}", count=n_rows)
    return _Segment(path, n_rows, keys, np.frombuffer(rest, dtype="<u4", count=n_rows, offset=n_rows * KEY))


def _offset(n_rows: int) -> int:
    """Return the position of the first row."""
    return _HEADER.size + n_rows * (KEY + 4) + 4


def _size(n_rows: int, width: int) -> int:
    return _offset(n_rows) + n_rows * width
