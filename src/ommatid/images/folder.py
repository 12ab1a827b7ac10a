"""The source `folder`: every file below a folder or URL, labelled by its sub-folder or by captions.csv."""

import posixpath
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ommatid.config import FolderSource
from ommatid.errors import SourceError
from ommatid.images.decode import MAX_BYTES, Unreadable
from ommatid.images.reference import Reference
from ommatid.images.source import Item, normalise
from ommatid.store.filesystem.csv_file import CsvFile, Row
from ommatid.store.filesystem.listing import Listed, count_of, list_images, some_of

CAPTIONS = "captions.csv"
"""Name of the optional file with captions, labels and taxonomy paths, at the top of the folder."""
COLUMNS = ("path", "caption", "label", "taxonomy")
"""Columns of that file."""
MAX_LOST = 0.5
"""Largest share of images named there that may not exist; with more, the file is taken to belong to another folder."""


@dataclass(frozen=True)
class Annotation:
    """The annotation of one image in captions.csv."""

    captions: tuple[str, ...] = ()
    """Distinct captions, in the order of their rows."""
    label: str | None = None
    """Label; None if the file has none for the image."""
    taxonomy: str | None = None
    """Taxonomy path; None if the file has none for the image."""


@dataclass(frozen=True)
class Annotations:
    """The content of captions.csv."""

    by_path: Mapping[str, Annotation]
    """Annotations by path of the image."""
    notices: Sequence[str]
    """Sentences about what was left out."""


def read_captions(data: bytes, where: str, paths: Collection[str]) -> Annotations:
    """Read captions.csv, joining the rows of each image.

    Args:
        data: Bytes of the file.
        where: Path or URL of the file, for messages.
        paths: Paths of the images, as in `Item.path`.

    Returns:
        The annotations.

    Raises:
        SourceError: The file is not CSV with these columns, some lines are invalid, or most rows name no image of the folder.
    """
    try:
        file = CsvFile(data, COLUMNS, COLUMNS[:1])
        if len(file.columns) - len(file.unknown_columns) < 2:
            raise ValueError(f"line 1 has the columns {', '.join(file.columns)}; it needs path and one of {', '.join(COLUMNS[1:])}")
        rows = list(file)
        by_path = _join(rows, _Paths(paths), file.problems)
        if file.problems:
            raise ValueError(file.problems_text())
    except ValueError as error:
        raise SourceError(f"{where}: {error}; correct or remove it") from None
    notices = (
        [f"{where}: {count_of(file.unknown_columns, 'column')} not used: {some_of(file.unknown_columns)}"] if file.unknown_columns else []
    )
    return Annotations(by_path, notices + _report_lost(by_path, where, paths))


class _Paths:
    """Lookup of image paths that ignores differences of Unicode normal form."""

    def __init__(self, paths: Collection[str]):
        self._exact = set(paths)
        self._composed = {unicodedata.normalize("NFC", path): path for path in paths}

    def find(self, cell: str) -> str:
        """Return the path of the image that a cell names, or the cell's own path if there is none."""
        if not cell:
            raise ValueError("column path: is empty; name the image, relative to the folder")
        path = posixpath.normpath(cell)
        return path if path in self._exact else self._composed.get(unicodedata.normalize("NFC", path), path)


def _join(rows: Sequence[Row], known: _Paths, problems: list[str]) -> dict[str, Annotation]:
    """Join the rows of each image; rows that contradict one another are appended to `problems`."""
    found: dict[str, Annotation] = {}
    for row in rows:
        try:
            path = known.find(row.cells["path"])
            found[path] = _merge(found.get(path, Annotation()), _annotation_of(row))
        except ValueError as error:
            problems.append(f"line {row.line}, {error}")
    return found


def _annotation_of(row: Row) -> Annotation:
    caption = row.cells.get("caption")
    return Annotation((caption,) if caption else (), row.cells.get("label") or None, normalise(row.cells.get("taxonomy")))


def _merge(one: Annotation, other: Annotation) -> Annotation:
    return Annotation(
        tuple(dict.fromkeys(one.captions + other.captions)),
        _same("label", one.label, other.label),
        _same("taxonomy", one.taxonomy, other.taxonomy),
    )


def _same(column: str, one: str | None, other: str | None) -> str | None:
    if one and other and one != other:
        raise ValueError(f"column {column}: {other!r}, but an earlier line has {one!r} for the same image; an image has one {column}")
    return one or other


def _report_lost(by_path: Mapping[str, Annotation], where: str, paths: Collection[str]) -> list[str]:
    """Return a sentence about annotated paths that are not in the folder, or an empty list if all are.

    Raises:
        SourceError: There are too many of them.
    """
    known = set(paths)
    if not (lost := [path for path in by_path if path not in known]):
        return []
    similar = {_loose_form(path): path for path in paths}
    near = [f"{path!r} (is {similar[_loose_form(path)]!r} meant?)" for path in lost if _loose_form(path) in similar]
    far = [repr(path) for path in lost if _loose_form(path) not in similar]
    sentence = f"{where}: {len(lost)} of {len(by_path)} images named there do not exist in the folder: {some_of(near + far)}"
    if len(lost) > MAX_LOST * len(by_path):
        raise SourceError(f"{sentence}; write paths relative to the folder, such as {min(paths)!r}")
    return [sentence]


def _loose_form(path: str) -> str:
    r"""Return a path without what differs between machines: case, \ or / as separator, and a slash at the beginning."""
    return posixpath.normpath(path.replace("\\", "/").lstrip("/")).casefold()


_TABLES = (".csv", ".tsv", ".json", ".jsonl")
"""Endings of files in which other programs store annotations."""


def open_source(params: FolderSource) -> "Folder":
    """Open the source that the params describe; see `Folder`."""
    return Folder(params.path)


class Folder:
    """The files below a folder (see `store.filesystem.listing`), sorted by path.

    The label is that of captions.csv, else the path of the file's own folder below the root: `dog` for `dog/x.jpg`, `dog/poodle` for
    `dog/poodle/x.jpg`. Files at the root have none.

    Raises:
        SourceError: The folder does not exist or is empty, or its captions.csv is invalid.
        ArtefactError: The URL cannot be reached.
    """

    def __init__(self, root: Path | str):
        self._listing = listing = list_images(root)
        self.fingerprint = listing.fingerprint
        self._files = [file for file in listing.files if file.name != CAPTIONS]
        if not self._files:
            raise SourceError(f"{root}: there is no file but {CAPTIONS}; put images there, or change images.source.path")
        annotations = Annotations({}, ())
        for file in listing.files:
            if file.name == CAPTIONS:
                try:
                    annotations = read_captions(file.read(MAX_BYTES), str(file), [image.name for image in self._files])
                except OSError as error:
                    raise SourceError(f"{file}: {error.strerror}; repair or remove it") from None
        self._annotations = annotations.by_path
        self.notices: Sequence[str] = [*annotations.notices, *_report_tables(str(root), [file.name for file in self._files])]
        self.total = len(self._files)

    def names(self) -> Iterator[str]:
        """Return the path of every file, in order."""
        return (file.name for file in self._files)

    def iter_items(self, positions: Sequence[int]) -> Iterator[Item]:
        """Iterate over the files at these positions, in order."""
        for position in positions:
            file = self._files[position]
            annotation = self._annotations.get(file.name, Annotation())
            label = annotation.label or posixpath.dirname(file.name) or None
            reference, token = Reference(file.folder.url, file.inside, file.size), self._listing.token(file)
            notes = label, annotation.captions, annotation.taxonomy
            yield Item(file.name, partial(_read, file), *notes, reference, token, file.is_unchanged)


def _read(file: Listed) -> bytes:
    """Read a file, of which the size is checked first, so that a video among the images is not read at every run.

    Raises:
        OSError: The file cannot be read.
        Unreadable: It is too large.
    """
    if file.size > MAX_BYTES:
        raise Unreadable("too_large", f"more than {MAX_BYTES} bytes")
    return file.read(MAX_BYTES + 1)


def _report_tables(root: str, names: Sequence[str]) -> list[str]:
    """Return a sentence about files that may hold annotations and are not read, or an empty list if there are none."""
    found = [name for name in names if name.lower().endswith(_TABLES)]
    return (
        [f"{root}: {count_of(found, 'file')} not read, as annotations are only read from {CAPTIONS} at the top: {some_of(found)}"]
        if found
        else []
    )
