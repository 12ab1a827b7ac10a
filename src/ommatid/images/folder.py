"""The folder source: every file below a folder or URL, its sub-folder the label; more may be said in captions.csv."""

import posixpath
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ommatid.errors import SourceError
from ommatid.images.decode import MAX_BYTES
from ommatid.images.source import Item, normalise
from ommatid.store.filesystem.csv_file import CsvFile, Row
from ommatid.store.filesystem.listing import count_of, list_images, some_of

CAPTIONS = "captions.csv"
COLUMNS = ("path", "caption", "label", "taxonomy")
MAX_LOST = 0.5
"""Share of rows that may name no file; with more of them the file is taken for that of another folder."""


@dataclass(frozen=True)
class Said:
    """What captions.csv says of one image."""

    captions: tuple[str, ...] = ()
    """One for each of its rows that has any, in their order, each once."""
    label: str | None = None
    """None: nothing."""
    taxonomy: str | None = None
    """None: nothing."""


@dataclass(frozen=True)
class Captions:
    """The whole file."""

    said: Mapping[str, Said]
    """By path of the image."""
    notices: Sequence[str]
    """What was left out, a sentence each."""


def read_captions(data: bytes, where: str, paths: Collection[str]) -> Captions:
    """Read captions.csv; rows of one image are put together.

    Args:
        data: Its bytes.
        where: Its path or URL, for messages.
        paths: The images' paths, as `Item.path` has them.

    Raises:
        SourceError: not a CSV file of this kind; or naming the lines of what is wrong, or that most rows name no file.
    """
    try:
        file = CsvFile(data, COLUMNS, COLUMNS[:1])
        if len(file.columns) - len(file.unknown_columns) < 2:
            raise ValueError(f"line 1 has the columns {', '.join(file.columns)}; it needs path and one of {', '.join(COLUMNS[1:])}")
        rows = list(file)
        said = _join(rows, _Names(paths), file.problems)
        if file.problems:
            raise ValueError(file.problems_text())
    except ValueError as error:
        raise SourceError(f"{where}: {error}; mend or remove it") from None
    notices = (
        [f"{where}: {count_of(file.unknown_columns, 'column')} not used: {some_of(file.unknown_columns)}"] if file.unknown_columns else []
    )
    return Captions(said, notices + _lost(said, where, paths))


class _Names:
    """The images' paths; a path that is the same text in another of Unicode's normal forms is the same path."""

    def __init__(self, paths: Collection[str]):
        self._exact = set(paths)
        self._composed = {unicodedata.normalize("NFC", path): path for path in paths}

    def find(self, cell: str) -> str:
        """The image's path, or what was given where there is none."""
        if not cell:
            raise ValueError("column path: is empty; name the image, relative to the folder")
        path = posixpath.normpath(cell)
        return path if path in self._exact else self._composed.get(unicodedata.normalize("NFC", path), path)


def _join(rows: Sequence[Row], names: _Names, problems: list[str]) -> dict[str, Said]:
    """What all rows of each image say together; rows that contradict one another are problems."""
    found: dict[str, Said] = {}
    for row in rows:
        try:
            path = names.find(row.cells["path"])
            found[path] = _both(found.get(path, Said()), _said(row))
        except ValueError as error:
            problems.append(f"line {row.line}, {error}")
    return found


def _said(row: Row) -> Said:
    caption = row.cells.get("caption")
    return Said((caption,) if caption else (), row.cells.get("label") or None, normalise(row.cells.get("taxonomy")))


def _both(one: Said, other: Said) -> Said:
    return Said(
        tuple(dict.fromkeys(one.captions + other.captions)),
        _same("label", one.label, other.label),
        _same("taxonomy", one.taxonomy, other.taxonomy),
    )


def _same(column: str, one: str | None, other: str | None) -> str | None:
    if one and other and one != other:
        raise ValueError(f"column {column}: {other!r}, and a line before says {one!r} of the same image; an image has one {column}")
    return one or other


def _lost(said: Mapping[str, Said], where: str, paths: Collection[str]) -> list[str]:
    """A sentence about paths that are no image of the folder.

    Raises:
        SourceError: there are too many of them.
    """
    known = set(paths)
    if not (lost := [path for path in said if path not in known]):
        return []
    meant = {_loosely(path): path for path in paths}
    near = [f"{path!r} (is {meant[_loosely(path)]!r} meant?)" for path in lost if _loosely(path) in meant]
    far = [repr(path) for path in lost if _loosely(path) not in meant]
    told = f"{where}: {len(lost)} of {len(said)} images named there are no file of the folder: {some_of(near + far)}"
    if len(lost) > MAX_LOST * len(said):
        raise SourceError(f"{told}; write paths relative to the folder, such as {min(paths)!r}")
    return [told]


def _loosely(path: str) -> str:
    r"""How a path is spelt but for what other machines spell otherwise: case, \ for /, and a slash at the begin."""
    return posixpath.normpath(path.replace("\\", "/").lstrip("/")).casefold()


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
