"""The folder source: every file below a folder or URL, its sub-folder the label, captions and taxonomy from an optional captions.csv."""

import csv
import hashlib
import io
import os
import posixpath
import stat
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ommatid.errors import SourceError
from ommatid.folder import Remote, open_folder
from ommatid.images.decode import MAX_BYTES
from ommatid.images.source import Item
from ommatid.images.taxonomy import normalise

CAPTIONS = "captions.csv"


@dataclass(frozen=True)
class _Said:
    """What a row of captions.csv says of its image."""

    caption: str | None = None
    """None: nothing."""
    taxonomy: str | None = None
    """None: nothing."""


@dataclass(frozen=True)
class _File:
    """A file of the source, not read yet."""

    name: str
    """Path below the root."""
    read: Callable[[int], bytes]
    """Gives at most so many bytes of it; raises OSError."""
    facts: str
    """Size and time of the last change, or the store's checksum; empty: it cannot be looked at."""


class Folder:
    """The files below a folder, sorted by path; hidden names are skipped.

    The label is the path of the file's own folder below the root (`dog/x.jpg`: dog, `dog/poodle/x.jpg`: dog/poodle);
    files at the root have none. Linked folders are followed, each real folder once.

    Raises:
        SourceError: no such folder, nothing in it, or a captions.csv that cannot be used.
        ArtefactError: a URL that cannot be reached.
    """

    def __init__(self, root: Path | str):
        folder = open_folder(root)
        found = sorted(_list_objects(folder) if isinstance(folder, Remote) else _list_files(Path(root)), key=lambda file: file.name)
        self._files = [file for file in found if file.name != CAPTIONS]
        if not self._files:
            raise SourceError(f"{root}: there are no files in this folder; put images there, or change images.source.path")
        captions = next((file for file in found if file.name == CAPTIONS), None)
        where = f"{folder / CAPTIONS}"
        self._said = _read_captions(where, captions) if captions else {}
        if self._said and self._said.keys().isdisjoint(file.name for file in self._files):
            raise SourceError(
                f"{where}: names no file of the folder, for one {next(iter(self._said))!r}; "
                f"write paths relative to {root}, such as {self._files[0].name!r}"
            )
        self.total = len(self._files)
        self.fingerprint = hashlib.sha256("".join(f"{file.name}\0{file.facts}\n" for file in found).encode()).hexdigest()

    def iter_items(self, positions: Sequence[int]) -> Iterator[Item]:
        """The files at these positions, in order."""
        for position in positions:
            file = self._files[position]
            label = posixpath.dirname(file.name) or None
            said = self._said.get(file.name, _Said())
            yield Item(file.name, partial(file.read, MAX_BYTES + 1), label, said.caption, said.taxonomy)


def _list_objects(folder: Remote) -> Iterator[_File]:
    folder.exists()  # tells a bucket that is not there from one without images
    for entry in folder.entries():
        if not any(part.startswith(".") for part in entry.name.split("/")):
            yield _File(entry.name, partial(_read_object, folder, entry.name, entry.bytes), f"{entry.bytes}\0{entry.stamp}")


def _read_object(folder: Remote, name: str, size: int, most: int) -> bytes:
    # no store gives a range of nothing
    return folder.read_range(name, 0, most) if size > most else folder.read_bytes(name)


def _list_files(root: Path) -> Iterator[_File]:
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "no such folder"
        raise SourceError(f"{root}: {what}; set images.source.path to a folder of images")
    for path in _walk(root):
        yield _File(_text(path.relative_to(root)), partial(_read, path), _facts(path))


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


def _read(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        return file.read(most)


def _facts(path: Path) -> str:
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_size}\0{status.st_mtime_ns}"


def _read_captions(where: str, captions: _File) -> dict[str, _Said]:
    """Path to what is said of it; rows that say nothing are passed over."""
    try:
        rows = csv.DictReader(io.StringIO(captions.read(MAX_BYTES).decode("utf-8-sig"), newline=""))
        names = set(rows.fieldnames or ())
        if "path" not in names or names.isdisjoint({"caption", "taxonomy"}):
            raise SourceError(
                f"{where}: its first line must name the columns path and caption, taxonomy or both; it names {rows.fieldnames}"
            )
        said = ((row["path"], _say(f"{where}, line {rows.line_num}", row)) for row in rows)
        return {posixpath.normpath(path): found for path, found in said if path and found != _Said()}
    except (csv.Error, UnicodeDecodeError) as error:
        raise SourceError(f"{where}: not a CSV file in UTF-8: {error}; mend or remove it") from None


def _say(where: str, row: Mapping[str, str | None]) -> _Said:
    try:
        return _Said(row.get("caption") or None, normalise(row.get("taxonomy")))
    except ValueError as error:
        raise SourceError(f"{where}: {error}") from None
