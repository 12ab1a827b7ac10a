"""Listings of the files at paths and URLs that users name. All readers of folders use them, and DVC's fingerprints are made from them.

A folder's files are its regular files at any depth, in order of name. Files and folders whose names begin with a dot are hidden and left
out. Links to folders are followed, and each real folder is listed once. Dangling links are listed, so that the reader can report them.
Pipes, sockets and devices are skipped, because reading one could block for ever.
"""

import hashlib
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ommatid.errors import SourceError
from ommatid.store.filesystem import Folder, open_folder

ACTIVATIONS = (".npy", ".safetensors", ".pt", ".pth", ".parquet")
"""Endings of the names of files of activations."""
CLASSES = "classes.txt"
"""Name of the file beside masks that names their classes."""
SETTLED_NS = 2 * 10**9
"""Age of a file's last change, in nanoseconds, below which another change might leave the same times."""
_SHOWN = 3
"""Number of names that a notice lists; the rest are counted."""


@dataclass(frozen=True)
class Listed:
    """A file in a listing, which has not been read."""

    name: str
    """Path below the listed folder, with slashes, as valid Unicode; for a single file, its own name."""
    size: int
    """Size in bytes."""
    stamp: str
    """Value that changes with the content: times of the last changes, or the store's checksum; empty if the file cannot be read."""
    folder: Folder
    """The folder through which the file is read."""
    inside: str
    """Name of the file in `folder`, which may not be valid Unicode."""

    def __str__(self) -> str:
        return f"{self.folder / self.inside}"

    @property
    def path(self) -> Path | None:
        """Path on this machine's disk; None if the file is behind a URL."""
        return self.folder.local_path(self.inside)

    @property
    def facts(self) -> str:
        """Size and stamp, which stay the same while the content does.

        Empty if the file cannot be read, or changed so recently that another change might leave the same times.
        """
        if not self.stamp or (self.path and time.time_ns() - _last_change(self.stamp) <= SETTLED_NS):
            return ""
        return f"{self.size} {self.stamp}"

    def is_unchanged(self) -> bool:
        """Return whether size and stamp are still those listed, so that what was read since is what they stand for."""
        try:
            entry = self.folder.entry(self.inside)
        except OSError:
            return False
        return entry is not None and (entry.bytes, entry.stamp) == (self.size, self.stamp)

    def read(self, most: int) -> bytes:
        """Read at most the first `most` bytes.

        Returns:
            The bytes.

        Raises:
            OSError: The file cannot be read.
        """
        # Stores refuse to read a range of an empty object.
        return self.folder.read_range(self.inside, 0, most) if self.size > most else self.folder.read_bytes(self.inside)[:most]


@dataclass(frozen=True)
class Listing:
    """The files found at a path or URL."""

    place: str
    """Absolute path with links resolved, or a URL."""
    files: Sequence[Listed]
    """Files to read, in order of name."""
    skipped: Sequence[str] = field(default=())
    """Names of the files left out because of their endings."""

    @property
    def fingerprint(self) -> str:
        """Digest of names, sizes and stamps. It is cheap to compute, and comparable on the same machine only."""
        return hashlib.sha256("".join(f"{file.name}\0{file.size}\0{file.stamp}\n" for file in self.files).encode()).hexdigest()

    def token(self, file: Listed, inside: str = "") -> str:
        """Return a text that identifies the content of a file in this listing on this machine, or of a part of it named `inside`.

        Files with the same token have the same content. Empty if nothing is known of the content without reading the file.
        """
        return f"{self.place}\0{file.inside}\0{inside}\0{facts}" if (facts := file.facts) else ""

    def notice(self, endings: Collection[str]) -> list[str]:
        """Return a sentence about the files left out, or an empty list if there are none."""
        if not self.skipped:
            return []
        names = "its name does" if len(self.skipped) == 1 else "their names do"
        return [f"{count_of(self.skipped, 'file')} not read, because {names} not end in {' or '.join(endings)}: {some_of(self.skipped)}"]


def _last_change(stamp: str) -> int:
    """Return the later time in a stamp of a local file; not a modification in the future, which only a program or a camera can have set."""
    modified, *changed = map(int, stamp.split())
    return max(changed) if changed and modified > time.time_ns() else max([modified, *changed])


def count_of(things: Collection[object], what: str) -> str:
    """Return a count with its verb, such as "1 file is" or "3 files are"."""
    return f"1 {what} is" if len(things) == 1 else f"{len(things)} {what}s are"


def some_of(names: Sequence[str]) -> str:
    """Return the first few names and the number of the rest. A name that is empty or has control characters is written as its repr."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name if name and name.isprintable() else repr(name) for name in names[:_SHOWN]) + more


def list_images(place: Path | str) -> Listing:
    """List what the folder source reads, which is every file of a folder. For errors, see `_list`."""
    return _list(place, "images.source.path", "a folder of images", "files", (), is_folder=True)


def list_parquet(place: Path | str) -> Listing:
    """List what the Parquet source reads, which is one file, or the *.parquet files of a folder. For errors, see `_list`."""
    return _list(place, "images.source.path", "a Parquet file or a folder of them", "files named *.parquet", (".parquet",))


def list_shards(place: Path | str) -> Listing:
    """List what the WebDataset source reads, which is one archive, or the *.tar files of a folder. For errors, see `_list`."""
    return _list(place, "images.source.path", "a tar archive or a folder of them", "files named *.tar", (".tar",))


def list_activations(place: Path | str) -> Listing:
    """List what `extract.source: files` reads: one file, or a folder's files with an ending in `ACTIVATIONS`. For errors, see `_list`."""
    names = ", ".join(ACTIVATIONS)
    return _list(place, "extract.path", f"a folder of {names} files, or to one of them", f"{names} files", ACTIVATIONS)


def list_masks(place: Path | str) -> Listing:
    """List masks of images, which are the *.png files of a folder, and the names of their classes. For errors, see `_list`."""
    return _list(place, "intervene.masks", "a folder of PNG files", "files named *.png", (".png", CLASSES), is_folder=True)


def list_any(place: Path | str, key: str) -> Listing:
    """List one file of any name, or all files of a folder. For errors, see `_list`."""
    return _list(place, key, "what is there", "files", ())


def _list(place: Path | str, key: str, allowed: str, what: str, endings: Collection[str], is_folder: bool = False) -> Listing:
    """List a single file, whose name may have any ending, or the files of a folder.

    Args:
        place: Path or URL.
        key: Params key that names the place, for messages.
        allowed: What the key may be set to, for messages.
        what: Description of the files to list, for messages.
        endings: Endings of the files to list; empty means all files.
        is_folder: Whether the place must be a folder.

    Returns:
        The listing, which also names the files that have other endings.

    Raises:
        SourceError: Nothing exists at the place, the folder has no such files, or a folder cannot be listed.
        ArtefactError: The URL cannot be reached.
    """
    root = open_folder(place)
    path = root.local_path()
    real = root.url if path is None else os.path.realpath(path)
    entry = root.entry()
    if entry and is_folder:
        raise SourceError(f"{place}: is a file, not a folder; set {key} to {allowed}")
    if entry:
        return Listing(real, [Listed(_text(root.name), entry.bytes, entry.stamp, root.parent, root.name)])
    if not root.exists():  # Raises its own error if the bucket does not exist.
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
    """Return a file's name with slashes, as valid Unicode. File names are arbitrary bytes, which Parquet strings cannot hold."""
    return os.fsencode(name.replace(os.sep, "/")).decode("utf-8", "backslashreplace")
