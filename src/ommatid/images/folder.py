"""The folder source: every file below a folder or URL, its sub-folder the label; what else is known from an optional captions.csv."""

import posixpath
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from ommatid.errors import SourceError
from ommatid.images.captions import CAPTIONS, Captions, Said, read_captions
from ommatid.images.decode import MAX_BYTES
from ommatid.images.source import Item
from ommatid.listing import count_of, list_images, some_of

_TABLES = (".csv", ".tsv", ".json", ".jsonl")
"""Endings of files that say something of images in other programs' folders."""


class Folder:
    """The files below a folder (see `listing`), sorted by path.

    The label is what captions.csv says, or else the path of the file's own folder below the root (`dog/x.jpg`: dog, `dog/poodle/x.jpg`:
    dog/poodle); files at the root have none.

    Raises:
        SourceError: no such folder, nothing in it, or a captions.csv that cannot be used.
        ArtefactError: a URL that cannot be reached.
    """

    def __init__(self, root: Path | str):
        listing = list_images(root)
        self.fingerprint = listing.fingerprint
        self._files = [file for file in listing.files if file.name != CAPTIONS]
        if not self._files:
            raise SourceError(f"{root}: there is no file but {CAPTIONS}; put images there, or change images.source.path")
        about = Captions({}, ())
        for file in listing.files:
            if file.name == CAPTIONS:
                try:
                    about = read_captions(file.read(MAX_BYTES), str(file), [image.name for image in self._files])
                except OSError as error:
                    raise SourceError(f"{file}: {error.strerror}; mend or remove it") from None
        self._said = about.said
        self.notices: Sequence[str] = [*about.notices, *_tables(str(root), [file.name for file in self._files])]
        self.total = len(self._files)

    def iter_items(self, positions: Sequence[int]) -> Iterator[Item]:
        """The files at these positions, in order."""
        for position in positions:
            file = self._files[position]
            said = self._said.get(file.name, Said())
            label = said.label or posixpath.dirname(file.name) or None
            yield Item(file.name, partial(file.read, MAX_BYTES + 1), label, said.captions, said.taxonomy)


def _tables(root: str, names: Sequence[str]) -> list[str]:
    """A sentence about files that may say something of the images and are not read, if any."""
    found = [name for name in names if name.lower().endswith(_TABLES)]
    return (
        [f"{root}: {count_of(found, 'file')} not read, for only {CAPTIONS} at the top says something of images: {some_of(found)}"]
        if found
        else []
    )
