"""Folders on a disk of this machine. Files are written under temporary names, synced and renamed, so none appears incomplete."""

import errno
import os
import shutil
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import BinaryIO

from ommatid.errors import SourceError
from ommatid.store.filesystem.base import Entry, Folder, is_temporary, nearest_folder, temporary_path, writing


class Disk(Folder):
    """A directory on this machine, or on a file system that it has mounted."""

    def __init__(self, path: Path):
        self.path = path
        self.url = str(path)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.name

    @property
    def parent(self) -> "Disk":
        """The directory that holds this one."""
        return Disk(self.path.parent)

    def __truediv__(self, name: str) -> "Disk":
        return Disk(self.path / name)

    def local_path(self, name: str = "") -> Path:
        """Return the path of a file, or of the directory itself."""
        return self.path / name

    def free_bytes(self) -> int:
        """Return the free bytes on the disk that holds, or would hold, the directory."""
        return shutil.disk_usage(nearest_folder(self.path)).free

    def exists(self) -> bool:
        """Return whether the directory exists."""
        return self.path.exists()

    def make(self, mark: str = "") -> None:
        """Make the directory, whose parent must exist."""
        with writing(self.path):
            self.path.mkdir(exist_ok=True)

    def is_made(self, mark: str) -> bool:
        """Return whether the directory exists."""
        return self.path.is_dir()

    def sizes(self, inside: str = "") -> dict[str, int]:
        """Return the size of every finished file, by name; an empty dict if the directory does not exist."""
        try:
            with os.scandir(self.path / inside) as found:
                return {entry.name: entry.stat().st_size for entry in found if not is_temporary(entry.name) and entry.is_file()}
        except FileNotFoundError:
            return {}

    def folders(self) -> list[str]:
        """Return the names of the subdirectories, in order."""
        try:
            with os.scandir(self.path) as found:
                return sorted(entry.name for entry in found if entry.is_dir())
        except FileNotFoundError:
            return []

    def iter_visible(self) -> Iterator[Entry]:
        """Yield regular files and dangling links at any depth, except hidden ones, whose path has a part that begins with a dot.

        Links to directories are followed, and every real directory is visited once.

        Raises:
            SourceError: A directory cannot be listed.
        """
        for name, status in _walk(self.url):
            yield Entry(name, 0, "") if status is None else Entry(name, status.st_size, _stamp_of(status))

    def entry(self, name: str = "") -> Entry | None:
        """Return the entry of a file, or None if it is missing or a directory."""
        try:
            status = (self.path / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Entry(name, status.st_size, _stamp_of(status)) if stat.S_ISREG(status.st_mode) else None

    def open(self, name: str, size: int | None = None) -> BinaryIO:
        """Open a file for reading from any position."""
        return (self.path / name).open("rb")

    def read_bytes(self, name: str) -> bytes:
        """Read a whole file."""
        return (self.path / name).read_bytes()

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Read the bytes of a file from `start` up to `end` or the end of the file."""
        with self.open(name) as file:
            file.seek(start)
            return file.read(end - start)

    def iter_bytes(self, names: Sequence[str]) -> Iterator[bytes]:
        """Yield the contents of many small files, in order."""
        return (self.read_bytes(name) for name in names)

    def put(self, path: Path, name: str) -> None:
        """Sync and rename a file, which must be on the same file system."""
        sync(path)
        os.replace(path, self.path / name)

    def mirror(self, bring: Iterable[str] = (), replace: str = "") -> AbstractContextManager[Path]:
        """Return a context manager that yields the directory itself, so that files written in its block are there at once."""
        return nullcontext(self.path)

    def share(self, name: str, to: str) -> None:
        """Make a hard link, or a copy if the file system does not support links."""
        temporary = temporary_path(self.path / to)
        (self.path / to).parent.mkdir(exist_ok=True)
        try:
            os.link(self.path / name, temporary)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV):
                raise
            shutil.copyfile(self.path / name, temporary)
            sync(temporary)
        os.replace(temporary, self.path / to)
        temporary.unlink(missing_ok=True)  # os.replace does nothing if both names already link to the same file.

    def remove(self, name: str) -> None:
        """Remove a file, or a directory with everything in it."""
        path = self.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def move(self, place: Folder, last: str) -> None:
        """Rename the directory at the new place, then this one to take its place. Between the two, readers find none for a moment."""
        assert isinstance(place, Disk), place
        for folder in (self.path, *(self.path / name for name in self.folders())):
            sync(folder)
        old = self.path.with_name(self.path.name + ".old")
        if old.exists():
            shutil.rmtree(old)
        if place.path.exists():
            os.rename(place.path, old)
        os.rename(self.path, place.path)
        sync(place.path.parent)
        if old.exists():
            shutil.rmtree(old)


def sync(path: Path) -> None:
    """Flush the content of a file, or the entries of a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _stamp_of(status: os.stat_result) -> str:
    """Return the modification time and the change time. Programs that restore the former after a change still alter the latter."""
    return f"{status.st_mtime_ns} {status.st_ctime_ns}"


def _walk(root: str) -> Iterator[tuple[str, os.stat_result | None]]:
    """Yield regular files, and dangling links with None. Directories reached by links come after all others."""
    entered: set[tuple[int, int]] = set()
    tops = deque([""])
    while tops:
        waiting = [tops.popleft()]
        while waiting:
            top = waiting.pop()
            here = os.path.join(root, top)
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            inside = []
            for entry in _scan(here):
                name = os.path.join(top, entry.name)
                try:
                    status = entry.stat()
                except OSError:
                    yield name, None
                    continue
                if stat.S_ISDIR(status.st_mode):
                    (tops if entry.is_symlink() else inside).append(name)
                elif stat.S_ISREG(status.st_mode):
                    yield name, status
            waiting += reversed(inside)


def _scan(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise SourceError(f"{folder}: cannot be listed ({error.strerror}); make it readable for this user, or move it away") from None
