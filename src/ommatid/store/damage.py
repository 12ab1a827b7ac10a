"""Detection of damage to an artefact's files: wrong sizes when it is opened, wrong checksums as blocks are read.

Reading some columns of a file checks only the blocks that hold them, so that checking takes little of the time of reading, however large
the file.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ommatid.errors import ArtefactError
from ommatid.store.filesystem import Folder, Ranges
from ommatid.store.manifest import File, child_of
from ommatid.store.sums import BLOCK, DIGITS, READ_BLOCKS, sums_of

_MOST_NAMED = 100
"""Number of files that an error message names; the rest are counted."""


def size_damage(folder: Folder, files: Sequence[File]) -> list[str]:
    """Describe each listed file that is missing or has the wrong size. For a child, only its manifest is checked."""
    found = folder.sizes()
    for file in files:
        if child_of(file.name) and (size := folder.size(file.name)) is not None:
            found[file.name] = size
    return differences(found, files)


def differences(found: Mapping[str, int], files: Sequence[File]) -> list[str]:
    """Describe each listed file that is missing from `found`, which maps names to sizes, or has the wrong size there."""
    missing = [f"{file.name}: missing" for file in files if file.name not in found]
    wrong = [(file, found[file.name]) for file in files if found.get(file.name, file.bytes) != file.bytes]
    return missing + [f"{file.name}: {size} bytes, the manifest says {file.bytes}" for file, size in wrong]


def raise_damage(folder: Folder, damage: list[str]) -> None:
    """Raise an error that describes the damage and says what to do, if there is any damage.

    Raises:
        ArtefactError: `damage` is not empty.
    """
    if damage:
        more = f"; and {len(damage) - _MOST_NAMED} more" if len(damage) > _MOST_NAMED else ""
        repro = "bring it back with `dvc checkout`, or delete the folder and run `dvc repro`"
        todo = repro if folder.is_local else "delete what is there and make it again"
        raise ArtefactError(f"{folder}: damaged ({len(damage)}): {'; '.join(damage[:_MOST_NAMED])}{more}; {todo}")


_Stamp = tuple[int, int, int, str]
"""Size in bytes, modification and change times in nanoseconds, and the checksums that a file was compared with."""
_checked: dict[tuple[int, int], tuple[_Stamp, bytearray]] = {}
"""Flags of the blocks found undamaged, for each file on a disk that this process has read, by device and inode."""


class Checked(Ranges):
    """A file of an artefact, open for reading from any position, that checks what it reads.

    Every block is compared with its checksum when it is read. On a disk, a block is checked once per process unless the file changes.

    Raises:
        ArtefactError: A block differs. Every method that reads or checks raises it.
    """

    def __init__(self, folder: Folder, file: File):
        super().__init__(file.bytes)
        self._folder, self._file = folder, file
        self._descriptor: int | None = None
        self._seen: bytearray | None = None  # None for objects: each read is a new transfer, so it is checked again.
        if path := folder.local_path(file.name):
            self._descriptor = os.open(path, os.O_RDONLY)
            self._seen = _seen(os.fstat(self._descriptor), file)

    def check(self, start: int = 0, end: int | None = None) -> None:
        """Check the blocks of a range of bytes, by default the whole file, except those that were checked before."""
        end = self._file.bytes if end is None else end
        for first in range(start // BLOCK, -(-end // BLOCK), READ_BLOCKS):
            self._whole_blocks(first, min(first + READ_BLOCKS, -(-end // BLOCK)), only_check=True)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        super().close()

    def _read_range(self, start: int, end: int) -> Any:
        first, last = start // BLOCK, -(-end // BLOCK)
        if self._seen is not None and all(self._seen[first:last]):
            return self._fetch(start, end)
        return memoryview(self._whole_blocks(first, last))[start - first * BLOCK : end - first * BLOCK]

    def _whole_blocks(self, first: int, last: int, only_check: bool = False) -> bytes:
        """Read and check the blocks from `first` up to `last`. With `only_check`, return nothing if all were checked before."""
        if only_check and self._seen is not None and all(self._seen[first:last]):
            return b""
        found = self._fetch(first * BLOCK, min(last * BLOCK, self._file.bytes))
        if sums_of(found) != self._file.blocks[first * DIGITS : last * DIGITS]:
            raise_damage(self._folder, [f"{self._file.name}: checksum differs"])
        if self._seen is not None:
            self._seen[first:last] = b"\1" * (last - first)
        return found

    def _fetch(self, start: int, end: int) -> bytes:
        assert not self.closed, f"{self._file.name} is closed"
        if self._descriptor is None:
            return self._folder.read_range(self._file.name, start, end)
        pieces = []
        while start < end and (piece := os.pread(self._descriptor, end - start, start)):
            pieces.append(piece)
            start += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def is_whole(folder: Folder, file: File) -> bool:
    """Return whether a file exists and all its blocks match its description."""
    if folder.size(file.name) != file.bytes:
        return False
    try:
        with Checked(folder, file) as opened:
            opened.check()
    except ArtefactError:
        return False
    return True


def trust(folder: Folder, file: File) -> None:
    """Mark all blocks of a file as checked, because this process has just written it."""
    if path := folder.local_path(file.name):
        seen = _seen(os.stat(path), file)
        seen[:] = b"\1" * len(seen)


def _seen(status: os.stat_result, file: File) -> bytearray:
    """Return the flags of a file's blocks: 1 for each found undamaged. All are 0 if the file was not read yet or has changed since."""
    stamp = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, file.blocks)
    known = _checked.get((status.st_dev, status.st_ino))
    if known is None or known[0] != stamp:
        known = _checked[status.st_dev, status.st_ino] = (stamp, bytearray(len(file.blocks) // DIGITS))
    return known[1]
