"""Listing of what a user names by a path or URL: one rule for every reader of folders, and for the fingerprints that DVC depends on.

A folder's files are its regular files at any depth, in order of name. Names that begin with a dot are hidden, be they of files or of
folders, and are left out. Linked folders are followed, each real folder once. A link that leads nowhere is listed, so that whoever reads
it can say so. Pipes, sockets and devices are passed over: reading them could wait for ever.
"""

import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ommatid.errors import SourceError
from ommatid.store.filesystem import Folder, open_folder

ACTIVATIONS = (".npy", ".safetensors", ".pt", ".pth", ".parquet")
"""Endings of files of activations."""
_SHOWN = 3
"""Names that a notice shows; the rest are counted."""


@dataclass(frozen=True)
class Listed:
    """A file that was found, not read yet."""

    name: str
    """Path below what was listed, with slashes, as valid Unicode; a single file's own name."""
    size: int
    """Size."""
    stamp: str
    """Changes when the content does: times of the last changes, or the store's checksum; empty: the file cannot be looked at."""
    folder: Folder
    """Where it lies."""
    inside: str
    """Its name for `folder`, which may not be valid Unicode."""

    def __str__(self) -> str:
        return f"{self.folder / self.inside}"

    @property
    def path(self) -> Path | None:
        """On this machine's disk; None: behind a URL."""
        return self.folder.local_path(self.inside)

    def read(self, most: int) -> bytes:
        """At most so many bytes of it; raises OSError."""
        # no store gives a range of an empty object
        return self.folder.read_range(self.inside, 0, most) if self.size > most else self.folder.read_bytes(self.inside)[:most]


@dataclass(frozen=True)
class Listing:
    """What was found at a path or URL."""

    place: str
    """Where: an absolute path without links, or a URL."""
    files: Sequence[Listed]
    """The files to be read, in order of name."""
    others: Sequence[str] = field(default=())
    """Names of files that are left out for their endings."""

    @property
    def fingerprint(self) -> str:
        """Changes with names, sizes and times: cheap to know on one machine, and different on another."""
        return hashlib.sha256("".join(f"{file.name}\0{file.size}\0{file.stamp}\n" for file in self.files).encode()).hexdigest()

    def notice(self, endings: Collection[str]) -> list[str]:
        """A sentence about the files left out, if any."""
        if not self.others:
            return []
        return [f"{count_of(self.others, 'file')} not read, for the name does not end in {' or '.join(endings)}: {some_of(self.others)}"]


def count_of(things: Collection[object], what: str) -> str:
    """Such as "1 file is" or "3 files are"."""
    return f"1 {what} is" if len(things) == 1 else f"{len(things)} {what}s are"


def some_of(names: Sequence[str]) -> str:
    """The first few names, and how many more there are; one that is empty or would steer a terminal is spelt out."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name if name and name.isprintable() else repr(name) for name in names[:_SHOWN]) + more


def list_images(place: Path | str) -> Listing:
    """What the folder source reads: every file of a folder. Raises SourceError, ArtefactError."""
    return _list(place, "images.source.path", "a folder of images", "files", (), is_folder=True)


def list_parquet(place: Path | str) -> Listing:
    """What the Parquet source reads: a file, or those of a folder named *.parquet. Raises SourceError, ArtefactError."""
    return _list(place, "images.source.path", "a Parquet file or a folder of them", "files named *.parquet", (".parquet",))


def list_activations(place: Path | str) -> Listing:
    """What `extract.source: files` reads: a file, or those of a folder with an ending of `ACTIVATIONS`. Raises SourceError."""
    names = ", ".join(ACTIVATIONS)
    return _list(place, "extract.path", f"a folder of {names} files, or to one of them", f"{names} files", ACTIVATIONS)


def list_any(place: Path | str, key: str) -> Listing:
    """A file, whatever its name, or all files of a folder. Raises SourceError, ArtefactError."""
    return _list(place, key, "what is there", "files", ())


def _list(place: Path | str, key: str, allowed: str, what: str, endings: Collection[str], is_folder: bool = False) -> Listing:
    """Files at or below `place`; a single file may have any ending.

    Raises:
        SourceError: nothing there, or nothing of `what`; a folder that cannot be listed.
        ArtefactError: a URL that cannot be reached.
    """
    root = open_folder(place)
    path = root.local_path()
    real = root.url if path is None else os.path.realpath(path)
    entry = root.entry()
    if entry and is_folder:
        raise SourceError(f"{place}: is a file, not a folder; set {key} to {allowed}")
    if entry:
        return Listing(real, [Listed(_text(root.name), entry.bytes, entry.stamp, root.parent, root.name)])
    if not root.exists():  # tells a bucket that is not there from one without files, too
        found = "no such folder" if is_folder else "no such file or folder"
        raise SourceError(f"{place}: {found}; bring it back with `dvc pull` if DVC keeps it, or set {key} to {allowed}")
    every = [Listed(_text(entry.name), entry.bytes, entry.stamp, root, entry.name) for entry in root.iter_visible()]
    every.sort(key=lambda file: file.name)
    files = [file for file in every if _ends(file.name, endings)]
    if not files:
        raise SourceError(f"{place}: there are no {what} in this folder, hidden ones aside; put some there, or change {key}")
    return Listing(real, files, [file.name for file in every if not _ends(file.name, endings)])


def _ends(name: str, endings: Collection[str]) -> bool:
    return not endings or name.lower().endswith(tuple(endings))


def _text(name: str) -> str:
    """A file's name as valid Unicode, with slashes: names are bytes, and Parquet's strings are not."""
    return os.fsencode(name.replace(os.sep, "/")).decode("utf-8", "backslashreplace")
