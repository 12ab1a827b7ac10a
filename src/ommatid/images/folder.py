"""The folder source: every file below a folder, its sub-folder the label, captions from an optional captions.csv."""

import csv
import hashlib
import os
import posixpath
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from ommatid.errors import SourceError
from ommatid.images.decode import MAX_BYTES
from ommatid.images.source import Item

CAPTIONS = "captions.csv"


class Folder:
    """The files below a folder, sorted by path; hidden names are skipped.

    The label is the path of the file's own folder below the root (`dog/x.jpg`: dog, `dog/poodle/x.jpg`: dog/poodle);
    files at the root have none. Linked folders are followed, each real folder once.

    Raises:
        SourceError: no such folder, nothing in it, or a captions.csv that cannot be used.
    """

    def __init__(self, root: Path):
        if not root.is_dir():
            what = "is a file, not a folder" if root.exists() else "no such folder"
            raise SourceError(f"{root}: {what}; set images.source.path to a folder of images")
        self._root = root
        found = sorted((_text(path.relative_to(root)), path) for path in _walk(root))
        self._files = [(name, path) for name, path in found if name != CAPTIONS]
        if not self._files:
            raise SourceError(f"{root}: there are no files in this folder; put images there, or change images.source.path")
        self._captions = _read_captions(root / CAPTIONS)
        self._check_captions()
        self.total = len(self._files)
        self.fingerprint = _fingerprint(found)

    def iter_items(self, positions: Sequence[int]) -> Iterator[Item]:
        """The files at these positions, in order."""
        for position in positions:
            name, path = self._files[position]
            label = posixpath.dirname(name) or None
            yield Item(name, partial(_read, path), label, self._captions.get(name))

    def _check_captions(self) -> None:
        if self._captions and self._captions.keys().isdisjoint(name for name, _ in self._files):
            raise SourceError(
                f"{self._root / CAPTIONS}: names no file of the folder, for one {next(iter(self._captions))!r}; "
                f"write paths relative to {self._root}, such as {self._files[0][0]!r}"
            )


def _walk(root: Path) -> Iterator[Path]:
    """Regular files, and links that lead nowhere; folders that are links wait until all real ones are known."""
    entered: set[tuple[int, int]] = set()
    tops = deque([root])
    while tops:
        for folder, children, names in os.walk(tops.popleft(), onerror=_refuse):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in entered:
                children.clear()
                continue
            entered.add((status.st_dev, status.st_ino))
            children[:] = sorted(name for name in children if not name.startswith("."))
            tops.extend(path for name in children if (path := Path(folder, name)).is_symlink())
            yield from (path for name in names if not name.startswith(".") and _is_candidate(path := Path(folder, name)))


def _refuse(error: OSError) -> None:
    raise SourceError(f"{error.filename}: cannot be listed ({error.strerror}); give it the rights, or move it away")


def _is_candidate(path: Path) -> bool:
    """Not a pipe, socket or device, whose reading could wait for ever."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True  # listed as rejected when it is read


def _text(path: Path) -> str:
    """The path as valid Unicode, with slashes: file names are bytes, and Parquet's strings are not."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def _read_captions(path: Path) -> dict[str, str]:
    """Path to caption."""
    if not path.exists():
        return {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            if not {"path", "caption"} <= set(rows.fieldnames or ()):
                raise SourceError(f"{path}: its first line must name the columns path and caption; it names {rows.fieldnames}")
            return {posixpath.normpath(row["path"]): row["caption"] for row in rows if row["path"] and row["caption"]}
    except (csv.Error, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: not a CSV file in UTF-8: {error}; mend or remove it") from None


def _fingerprint(files: list[tuple[str, Path]]) -> str:
    digest = hashlib.sha256()
    for name, path in files:
        try:
            status = path.stat()
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{name}\0\n".encode())
    return digest.hexdigest()
