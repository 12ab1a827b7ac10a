"""The source `parquet`: a column of encoded images in one file, or in every .parquet file below a folder."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ommatid.config import ParquetSource
from ommatid.errors import SourceError, gist
from ommatid.images.decode import Unreadable
from ommatid.images.source import Item, normalise
from ommatid.store.filesystem import READ_BYTES
from ommatid.store.filesystem.listing import Listed, count_of, list_parquet, some_of

_ROWS_AT_ONCE = 32
"""Number of rows held in memory, which is small because a row may be a large photograph."""
_TAXONOMIES_AT_ONCE = 65_536
"""Number of rows read at a time to check their taxonomy paths."""


@contextmanager
def _opened(file: Listed) -> Iterator[pq.ParquetFile]:
    """Open a file; a failure to read it, also in the block, raises SourceError."""
    try:
        # buffered, so that pages are read as needed; by default pyarrow reads the whole column of a row group
        source, size = (file.folder.open(file.inside, file.size), READ_BYTES) if file.path is None else (file.path, 2**20)
        with pq.ParquetFile(source, buffer_size=size, pre_buffer=False) as opened:
            yield opened
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{file}: cannot be read as Parquet: {gist(error)}; repair or remove it") from None


@dataclass(frozen=True)
class _Group:
    """A row group of one file."""

    file: Listed
    index: int
    start: int
    """Position of its first row in the source."""
    row: int
    """Index of its first row in the file."""
    n_rows: int
    """Number of rows."""


def open_source(params: ParquetSource) -> "ParquetFiles":
    """Open the source that the params describe; see `ParquetFiles`."""
    return ParquetFiles(params)


class ParquetFiles:
    """The rows of Parquet files in order of path; a row's path is `<file>#<row in the file>`.

    Raises:
        SourceError: There are no rows, a file is not Parquet, a column named in images.source is missing or of another type, or a taxonomy
            path is invalid.
    """

    def __init__(self, params: ParquetSource):
        self._params = params
        listing = list_parquet(params.path)
        self.fingerprint = listing.fingerprint
        self._groups: list[_Group] = []
        self.total = 0
        self._unread: dict[str, None] = {}
        for file in listing.files:
            self._append(file)
        if not self.total:
            raise SourceError(f"{params.path}: there are no rows; change images.source.path")
        notices = [f"{params.path}: {sentence}" for sentence in listing.notice([".parquet"])]
        if self._unread:
            notices += [
                f"{params.path}: {count_of(self._unread, 'column')} not read: {some_of(list(self._unread))}; "
                "images.source.label_column and taxonomy_column name those to keep"
            ]
        self.notices: Sequence[str] = notices

    def names(self) -> Iterator[str]:
        """Return the path of every row, in order."""
        return (f"{group.file.name}#{group.row + i}" for group in self._groups for i in range(group.n_rows))

    def iter_items(self, positions: Sequence[int]) -> Iterator[Item]:
        """Iterate over the rows at these positions, in order; row groups without any of them are not read."""
        for group in self._groups:
            first, last = (bisect_left(positions, edge) for edge in (group.start, group.start + group.n_rows))
            if first < last:
                yield from self._iter_group(group, {position - group.start for position in positions[first:last]})

    def _append(self, file: Listed) -> None:
        with _opened(file) as opened:
            _check_columns(str(file), opened.schema_arrow, self._params)
            self._unread |= dict.fromkeys(_unread(opened.schema_arrow, self._params))
            if self._params.taxonomy_column:
                _check_taxonomy(str(file), opened, self._params.taxonomy_column)
            row = 0
            for index in range(opened.num_row_groups):
                n_rows = opened.metadata.row_group(index).num_rows
                self._groups.append(_Group(file, index, self.total, row, n_rows))
                row, self.total = row + n_rows, self.total + n_rows

    def _iter_group(self, group: _Group, wanted: set[int]) -> Iterator[Item]:
        named = (self._params.column, self._params.label_column, self._params.taxonomy_column)
        columns = [name for name in named if name is not None]
        row = 0
        with _opened(group.file) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group.index], columns=columns, use_threads=False):
                for i in range(batch.num_rows):
                    if row + i in wanted:
                        yield self._item(batch, i, f"{group.file.name}#{group.row + row + i}")
                row += batch.num_rows

    def _item(self, batch: pa.RecordBatch, i: int, path: str) -> Item:
        label, taxonomy = (_value(batch, name, i) for name in (self._params.label_column, self._params.taxonomy_column))
        return Item(
            path,
            partial(_read, batch.column(self._params.column)[i]),
            None if label is None else str(label).strip() or None,
            taxonomy=normalise(taxonomy),
        )


def _value(batch: pa.RecordBatch, column: str | None, i: int) -> Any:
    return None if column is None else batch.column(column)[i].as_py()


def _read(value: Any) -> bytes:
    """Return the encoded image in an Arrow scalar, which is binary or a struct.

    Raises:
        Unreadable: The scalar holds no image.
    """
    found = value.as_py()
    encoded = found.get("bytes") if isinstance(found, dict) else found
    if encoded is None and isinstance(found, dict) and found.get("path"):
        raise Unreadable("empty", "bytes is null and path names a file, which is not looked for; write the file's bytes into the column")
    if encoded is None:
        raise Unreadable("empty", "null: the row has no image")
    return encoded


def _unread(schema: pa.Schema, params: ParquetSource) -> list[str]:
    """List the columns that images.source does not name."""
    return [name for name in schema.names if name not in (params.column, params.label_column, params.taxonomy_column)]


def _check_columns(path: str, schema: pa.Schema, params: ParquetSource) -> None:
    for name in (params.column, params.label_column, params.taxonomy_column):
        if schema.names.count(name) > 1:
            raise SourceError(f"{path}: has {schema.names.count(name)} columns named {name}; give each another name")
    known = ", ".join(f"{field.name} ({field.type})" for field in schema)
    image = _type_of(schema, params.column)
    if image is None or not _holds_images(image):
        what = "there is no such column" if image is None else f"holds {image}, not binary or a struct with a binary field `bytes`"
        raise SourceError(f"images.source.column is {params.column!r}: {what}; {path} has {known}")
    optional = (("label_column", _holds_labels, "strings or integers"), ("taxonomy_column", _holds_strings, "strings"))
    for key, holds, allowed in optional:
        if (name := getattr(params, key)) is not None and ((type_ := _type_of(schema, name)) is None or not holds(type_)):
            what = "there is no such column" if type_ is None else f"holds {type_}, not {allowed}"
            raise SourceError(f"images.source.{key} is {name!r}: {what}; {path} has {known}")


def _check_taxonomy(path: str, file: pq.ParquetFile, column: str) -> None:
    """Check all taxonomy paths before any image is read, so that a bad one at the end of a large file is reported at once."""
    row = 0
    for batch in file.iter_batches(_TAXONOMIES_AT_ONCE, columns=[column], use_threads=False):
        for i, value in enumerate(batch.column(column).to_pylist()):
            try:
                normalise(value)
            except ValueError as error:
                raise SourceError(f"{path}, row {row + i}, column {column!r}: {error}") from None
        row += batch.num_rows


def _type_of(schema: pa.Schema, column: str) -> pa.DataType | None:
    return schema.field(column).type if column in schema.names else None


def _holds_images(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        index = type_.get_field_index("bytes")
        return index >= 0 and _is_binary(type_.field(index).type)
    return _is_binary(type_)


def _is_binary(type_: pa.DataType) -> bool:
    value = _value_type(type_)
    return pa.types.is_binary(value) or pa.types.is_large_binary(value) or pa.types.is_binary_view(value)


def _holds_labels(type_: pa.DataType) -> bool:
    return pa.types.is_integer(_value_type(type_)) or _holds_strings(type_)


def _holds_strings(type_: pa.DataType) -> bool:
    value = _value_type(type_)
    return pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)


def _value_type(type_: pa.DataType) -> pa.DataType:
    return type_.value_type if pa.types.is_dictionary(type_) else type_
