"""References to image files, which a data set may hold in place of their content, and the one function that reads either.

The column `encoded` then holds a record in JSON: where the file is, its size and its sha256. No image file begins like one.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from ommatid.errors import ArtefactError, gist
from ommatid.store.filesystem import Folder, open_folder

_BEGINNING = b'{"place":'


@dataclass(frozen=True)
class Reference:
    """A file, or a part of one, that is an image."""

    place: str
    """Folder, as images.source.path names it: relative to the checkout, absolute, or a URL."""
    name: str
    """Name of the file in the folder. It may hold surrogates, as file names are arbitrary bytes."""
    size: int
    """Size of the image in bytes."""
    offset: int | None = None
    """Byte of the file at which the image begins, if it is a part; None if it is the whole file."""
    sha256: str = ""
    """Checksum of the image, in hex digits."""

    def dump(self) -> bytes:
        """Return the record for the column `encoded`."""
        return json.dumps(asdict(self)).encode()

    def read(self, base: Path | None = None) -> bytes:
        """Read the image, and compare it with its size and checksum.

        Args:
            base: Folder to which relative places are relative, if they do not exist in the current directory or in the checkout of the run.

        Returns:
            The content of the image file.

        Raises:
            ArtefactError: The file is missing, cannot be read, or has changed.
        """
        folder = _find(self.place, self.name, base)
        try:
            if self.offset is None:
                found = folder.read_bytes(self.name)
            else:
                found = folder.read_range(self.name, self.offset, self.offset + self.size)
        except FileNotFoundError:
            raise self._error(folder, "is missing") from None
        except OSError as error:
            raise self._error(folder, f"cannot be read ({gist(error)})") from None
        if len(found) != self.size or hashlib.sha256(found).hexdigest() != self.sha256:
            from ommatid.images.memory import forget  # only now, as it loads a library of images

            forget(self.sha256)  # `ommatid images` would refer to the same content again if the file's times are those of before
            raise self._error(folder, "has changed")
        return found

    def _error(self, folder: Folder, what: str) -> ArtefactError:
        part = "" if self.offset is None else f", bytes {self.offset} to {self.offset + self.size}"
        name = f"{folder / self.name}".encode(errors="backslashreplace").decode()
        return ArtefactError(
            f"{name}{part}: this image, to which the data set refers (images.by_reference), {what}; "
            "restore it, or run `ommatid images` again"
        )


def _find(place: str, name: str, base: Path | None) -> Folder:
    """Open the folder of a reference: the first that has the file, or else the first that exists.

    A relative one is looked for in the current directory, in the checkout of the run, and in `base`. An experiment's worktree links to the
    checkout's, unless the params of the experiment name another source.
    """
    if "://" in place or os.path.isabs(place):
        return open_folder(place)
    checkout = os.environ.get("OMMATID_CHECKOUT")
    folders = [Path(place), *(Path(folder) / place for folder in (checkout, base) if folder)]
    found = [folder for folder in folders if (folder / name).exists()] or [folder for folder in folders if folder.exists()] or folders
    return open_folder(found[0])


def parse_reference(encoded: bytes) -> Reference | None:
    """Return the reference in a value of the column `encoded`, or None if the value is the content of an image file."""
    return Reference(**json.loads(encoded)) if encoded.startswith(_BEGINNING) else None


def load_file(encoded: bytes, base: Path | None = None) -> bytes:
    """Return the content of an image file.

    Args:
        encoded: A value of the column `encoded`: the content, or a reference to it.
        base: See `Reference.read`.

    Returns:
        The content, which is that of the time when the data set was made.

    Raises:
        ArtefactError: It is a reference, and the file is missing or has changed.
    """
    reference = parse_reference(encoded)
    return encoded if reference is None else reference.read(base)
