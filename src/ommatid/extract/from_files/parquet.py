"""Parquet files that hold activations in one column, as bytes of one width or as lists of floats."""

from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ommatid.errors import SourceError, gist
from ommatid.extract.from_files.base import IMAGE, Piece, as_int64, check_images, check_shape, choose, find_unread


class ParquetFile:
    """A Parquet file with a column of vectors (bytes, lists or fixed-size lists), and perhaps a column of images."""

    def __init__(self, path: Path, key: str | None):
        self.path = path
        self.paths = (path,)
        with _parquet(path) as file:
            schema, n_rows = file.schema_arrow, file.metadata.num_rows
            if twice := [name for name in schema.names if schema.names.count(name) > 1]:
                raise SourceError(f"{path}: has {schema.names.count(twice[0])} columns named {twice[0]}; give each another name")
            known = {field.name: str(field.type) for field in schema if key is not None or _is_vector(field.type)}
            self._name = choose(path, key, known, "column")
            type_ = schema.field(self._name).type
            if not _is_vector(type_):
                raise SourceError(f"{path}: column {self._name} holds {type_}; activations must be fixed-width bytes or lists of floats")
            self._bytes_dtype = _bytes_dtype(path, schema) if _is_bytes(type_) else None
            self._width = self._width_of(file, type_) if n_rows else 0
            self.has_images = IMAGE in schema.names
            self.unread = find_unread(path, schema.names, self._name)
            if self.has_images:
                images = schema.field(IMAGE).type
                check_images(path, (n_rows,), n_rows, images, pa.types.is_integer(images))
        self.shape = (n_rows, self._width)
        check_shape(path, self.shape, type_, True)

    def iter_images(self, n: int) -> Iterator[np.ndarray]:
        """See `ActivationFile`."""
        for start, batch in self._iter_batches(n, [IMAGE]):
            yield self._images(batch, start)

    def iter_pieces(self, n: int, wanted: Container[int]) -> Iterator[Piece]:
        """See `ActivationFile`."""
        columns = [self._name, IMAGE] if self.has_images else [self._name]
        for index, (start, batch) in enumerate(self._iter_batches(n, columns)):
            if index in wanted:
                yield index, self._vectors(batch, start), self._images(batch, start) if self.has_images else None

    def _iter_batches(self, n: int, columns: list[str]) -> Iterator[tuple[int, pa.Table]]:
        """Yield tables of `n` rows, which may span row groups, each with the index of its first row."""
        waiting, start = [], 0
        with _parquet(self.path) as file:
            for batch in file.iter_batches(n, columns=columns):
                waiting.append(pa.Table.from_batches([batch]))
                if (n_waiting := sum(map(len, waiting))) >= n:
                    rows = pa.concat_tables(waiting)
                    yield start, rows.slice(0, n)
                    start, waiting = start + n, [rows.slice(n)] if n_waiting > n else []
            if waiting:
                yield start, pa.concat_tables(waiting)

    def _images(self, rows: pa.Table, start: int) -> np.ndarray:
        self._check_nulls(rows[IMAGE], start, IMAGE)
        return as_int64(rows[IMAGE].to_numpy())

    def _vectors(self, rows: pa.Table, start: int) -> Tensor:
        column = rows[self._name].combine_chunks()
        self._check_nulls(column, start, self._name)
        widths = self._widths(column)
        wrong = (widths != self._width).nonzero()[0]
        if len(wrong):
            raise SourceError(
                f"{self.path}: row {start + wrong[0]} of column {self._name} has {widths[wrong[0]]} values, row 0 has {self._width}; "
                "all vectors must be equally wide"
            )
        flat = self._from_lists(column, start) if self._bytes_dtype is None else self._from_bytes(column, self._bytes_dtype)
        return torch.from_numpy(flat.astype(flat.dtype.newbyteorder("="), copy=True).reshape(len(rows), self._width))

    def _from_lists(self, column: pa.Array, start: int) -> np.ndarray:
        values = column.flatten()
        self._check_nulls(values, start, self._name, self._width)
        return values.to_numpy(zero_copy_only=False)

    def _from_bytes(self, column: pa.Array, dtype: np.dtype) -> np.ndarray:
        fixed = column.cast(pa.binary(self._width * dtype.itemsize))
        return np.frombuffer(fixed.buffers()[1], dtype)[fixed.offset * self._width :][: len(fixed) * self._width]

    def _widths(self, column: pa.Array) -> np.ndarray:
        if self._bytes_dtype is None:
            return pc.call_function("list_value_length", [column]).to_numpy(zero_copy_only=False)
        lengths = pc.call_function("binary_length", [column]).to_numpy(zero_copy_only=False)
        if (odd := (lengths % self._bytes_dtype.itemsize).nonzero()[0]).size:
            raise SourceError(
                f"{self.path}: column {self._name} is {lengths[odd[0]]} bytes wide, not a multiple of the size of {self._bytes_dtype.name}"
            )
        return lengths // self._bytes_dtype.itemsize

    def _width_of(self, file: pq.ParquetFile, type_: pa.DataType) -> int:
        """Return the number of values in the first row."""
        first = next(file.iter_batches(1, columns=[self._name])).column(0)
        self._check_nulls(first, 0, self._name)
        return int(self._widths(first)[0])

    def _check_nulls(self, column: Any, start: int, name: str, width: int = 1) -> None:
        if column.null_count:
            row = start + int(pc.call_function("is_null", [column]).to_numpy(zero_copy_only=False).argmax()) // width
            raise SourceError(f"{self.path}: row {row} of column {name} is null; every row must have a value")


@contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        # Reads are buffered because pyarrow otherwise holds whole row groups, and one may be the whole file.
        with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError) as error:  # Arrow also raises OSError for damaged files.
        raise SourceError(f"{path}: cannot be read as Parquet ({gist(error)}); repair it, or write it again") from None


def _is_vector(type_: pa.DataType) -> bool:
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        return pa.types.is_floating(type_.value_type)
    return _is_bytes(type_)


def _is_bytes(type_: pa.DataType) -> bool:
    return pa.types.is_fixed_size_binary(type_) or pa.types.is_binary(type_) or pa.types.is_large_binary(type_)


def _bytes_dtype(path: Path, schema: pa.Schema) -> np.dtype:
    """Return the dtype of byte columns: that in the schema's metadata, which Ommatid's own artefacts have, or else float16."""
    name = (schema.metadata or {}).get(b"dtype", b"float16").decode()
    if name not in ("float16", "float32", "float64"):
        raise SourceError(f"{path}: the schema's metadata says dtype={name}; it must be float16, float32 or float64")
    return np.dtype(name).newbyteorder("<")
