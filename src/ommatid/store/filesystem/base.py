"""The interface of folders, code that both implementations share, and helpers for writing local files atomically."""

import hashlib
import io
import os
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ommatid.errors import ArtefactError, Lack, describe, find_lack

READ_BYTES = 8 * 2**20
"""Bytes per request when an object is read from end to end: few enough to hold, but enough to hide the latency of a request."""


@dataclass(frozen=True)
class Entry:
    """A file below a folder."""

    name: str
    """Path below the folder, with slashes."""
    bytes: int
    """Size in bytes."""
    stamp: str
    """Value that changes with the content: the store's checksum, or the time of the last change; empty if the file cannot be read."""


class Folder(ABC):
    """A folder of files. Names of files are relative to it, and may contain slashes."""

    url: str
    """Path or URL from which `open_folder` makes this folder again, in this process or another."""

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    @abstractmethod
    def parent(self) -> "Folder":
        """The folder that holds this one."""

    @abstractmethod
    def __truediv__(self, name: str) -> "Folder": ...

    @property
    def is_local(self) -> bool:
        """Whether the files are on a disk of this machine, so that they have paths, and locks of this machine protect them."""
        return self.local_path() is not None

    @abstractmethod
    def local_path(self, name: str = "") -> Path | None:
        """Return the path of a file, or of the folder itself, on a disk of this machine; None if it is behind a URL."""

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Return the free bytes on the disk that holds, or would hold, the folder; None if it is behind a URL."""

    @abstractmethod
    def exists(self) -> bool:
        """Return whether the folder exists.

        Raises:
            ArtefactError: The server or bucket cannot be reached.
        """

    @abstractmethod
    def make(self, mark: str = "") -> None:
        """Make the folder, whose parent must exist.

        Object stores have no folders: there, an empty object named `mark`, if given, marks the folder as made.
        """

    @abstractmethod
    def is_made(self, mark: str) -> bool:
        """Return whether `make(mark)` was called and the folder has not been removed since."""

    @abstractmethod
    def sizes(self, inside: str = "") -> dict[str, int]:
        """Return the size of every file in the folder, or in its subfolder `inside`, by name. This takes one listing."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Return the names of the subfolders, in order."""

    @abstractmethod
    def iter_visible(self) -> Iterator[Entry]:
        """Yield the files at any depth, in any order, except hidden ones, whose path has a part that begins with a dot.

        Raises:
            SourceError: A folder cannot be listed.
        """

    @abstractmethod
    def entry(self, name: str = "") -> Entry | None:
        """Return the entry of a file, or of what this object names if that is a file; None if it is missing or a folder."""

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, or None if it is missing."""
        entry = self.entry(name)
        return entry.bytes if entry else None

    @abstractmethod
    def open(self, name: str, size: int | None = None) -> BinaryIO:
        """Open a file for reading from any position. Passing its `size`, if known, saves a lookup.

        Returns:
            The open file.

        Raises:
            FileNotFoundError: The file is missing.
        """

    @abstractmethod
    def read_bytes(self, name: str) -> bytes:
        """Read a whole file.

        Returns:
            The content.

        Raises:
            FileNotFoundError: The file is missing.
        """

    @abstractmethod
    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Read the bytes of a file from `start` up to `end` or the end of the file.

        Returns:
            The bytes.

        Raises:
            FileNotFoundError: The file is missing.
        """

    @abstractmethod
    def iter_bytes(self, names: Sequence[str]) -> Iterator[bytes]:
        """Yield the contents of many small files, in order.

        Raises:
            FileNotFoundError: A file is missing.
        """

    @abstractmethod
    def put(self, path: Path, name: str) -> None:
        """Move the finished file at `path` on this machine into the folder, where it appears only once it is complete."""

    @abstractmethod
    def mirror(self, bring: Iterable[str] = (), replace: str = "") -> AbstractContextManager[Path]:
        """Return a context manager that yields a local folder, and puts the files written there into this folder when its block ends.

        It does so even if the block ends with an error.

        Args:
            bring: Files that the block reads. Those that exist are copied to the local folder first.
            replace: Name of a subfolder. If the block makes it, files that this folder has there, and that the block did not write, are
                removed.

        Returns:
            The context manager.
        """

    @abstractmethod
    def share(self, name: str, to: str) -> None:
        """Give a file a second name without transferring it again."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file, or a folder with everything in it. Do nothing if it is missing."""

    @abstractmethod
    def move(self, place: "Folder", last: str) -> None:
        """Move this folder to `place`, replacing what is there.

        Args:
            place: The new place, a folder of the same kind (disk or remote).
            last: Name of the file that marks a folder, or a subfolder, as complete. It is moved last.
        """

    def sha256(self, name: str, size: int | None = None) -> str:
        """Return the sha256 of a file, in hex digits."""
        digest = hashlib.sha256()
        with self.open(name, size) as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def fetch(self, name: str, to: Path, sha256: str | None = None) -> None:
        """Copy a file to this machine, where it appears only once it is complete.

        Args:
            name: Name of the file.
            to: Path of the copy.
            sha256: Expected checksum, in hex digits; None means that it is not checked.

        Raises:
            ArtefactError: The checksum of the fetched file is not `sha256`, or the file cannot be written.
        """
        temporary = temporary_path(to)
        with writing(to):
            to.parent.mkdir(parents=True, exist_ok=True)
            try:
                with self.open(name) as source, temporary.open("wb") as target:
                    digest = hashlib.sha256()
                    while block := source.read(READ_BYTES):
                        digest.update(block)
                        target.write(block)
                if sha256 not in (None, digest.hexdigest()):
                    raise ArtefactError(f"{self.url}/{name}: checksum differs from the manifest's; make it again")
                os.replace(temporary, to)
            finally:
                temporary.unlink(missing_ok=True)


class Ranges(io.RawIOBase):
    """A file of known size that can be read from any position. Subclasses implement `_read_range`."""

    def __init__(self, size: int):
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position at which the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position and return it."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> Any:
        """Read the next bytes. The result may be any object that supports the buffer protocol."""
        start = self._at
        end = self._size if size is None or size < 0 else min(start + size, self._size)
        if end <= start:
            return b""
        self._at = end
        return self._read_range(start, end)

    def readall(self) -> Any:
        """Read all remaining bytes."""
        return self.read()

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with the next bytes and return their number."""
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def _read_range(self, start: int, end: int) -> Any:
        raise NotImplementedError


def cache_folder() -> Path:
    """Return the user's cache folder, which need not exist: $OMMATID_CACHE, else ~/.cache/ommatid."""
    return Path(os.environ.get("OMMATID_CACHE") or Path.home() / ".cache" / "ommatid")


def temporary_path(path: Path) -> Path:
    """Return a path beside `path` at which to write the file before it is renamed. No other writer or process gets the same path."""
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def replace_text(path: Path, text: str) -> None:
    """Write a small text file in UTF-8: see `replace_bytes`."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a small file as a whole or not at all, in place of the one that is there, and make its folder.

    Raises:
        OSError: The file cannot be written; the one that was there is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Return whether a name is that of an unfinished file. safetensors uses its own temporary names, `.tmp` and six letters."""
    return name.endswith(".tmp") or name.startswith(".tmp")


def in_words(n_bytes: float) -> str:
    """Format a size for people to read, such as `20 kB`, `3.5 MB` or `2.0 GB`."""
    if n_bytes < 1e6:
        return f"{n_bytes / 1e3:.0f} kB"
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:.1f} GB"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn disk errors, whichever library raised them, into an `ArtefactError` that says what to do.

    Raises:
        ArtefactError: The disk is full, read-only or failing, or `path` may not be written.
    """
    try:
        yield
    except Exception as error:
        lack = find_lack(error)
        if lack not in _OF_DISKS:
            raise
        raise ArtefactError(f"{path}: {_explain(lack, error, path)} and run the stage again: what is finished is kept") from error


_OF_DISKS = (Lack.SPACE, Lack.QUOTA, Lack.FILE_SIZE, Lack.READ_ONLY, Lack.DENIED, Lack.FILES, Lack.DISK)


def _explain(lack: Lack, error: Exception, path: Path) -> str:
    what, todo = lack.value
    if lack in (Lack.SPACE, Lack.QUOTA):
        return f"{what} ({in_words(shutil.disk_usage(nearest_folder(path)).free)} free); {todo}"
    if lack in (Lack.READ_ONLY, Lack.DENIED):
        return f"cannot be written ({what}); make {nearest_folder(path)} writable for this user"
    return f"{what} ({describe(error)}); {todo}"


def nearest_folder(path: Path) -> Path:
    """Return `path` if it is an existing folder, else the nearest existing folder above it."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
