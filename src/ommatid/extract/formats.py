"""Files of activations that were made elsewhere: npy, safetensors, .pt and Parquet behind one small protocol. See docs/import.md."""

import pickle
import re
import zipfile
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ommatid.errors import SourceError

IMAGE = "image"
"""The tensor or column that says which image a row, or an entry of the first dimension, comes from."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Piece = tuple[int, Tensor, np.ndarray | None]
"""Index of the piece, its activations (entries, ...) and their images (entries,) int64."""


class ActivationFile(Protocol):
    """One file. Its entries are tokens where `shape` has two dimensions, images where it has three."""

    path: Path
    shape: tuple[int, ...]
    """(tokens, d_model) or (images, tokens, d_model)."""
    has_images: bool
    """Whether it says which image each entry comes from."""

    def iter_images(self, n: int) -> Iterator[np.ndarray]:
        """The image of every entry in order, `n` entries a piece; only where `has_images`."""
        ...

    def iter_pieces(self, n: int, wanted: Container[int]) -> Iterator[Piece]:
        """The file in pieces of `n` entries, in order; only the wanted ones."""
        ...


def open_files(place: Path, key: str | None) -> list[ActivationFile]:
    """The files at `place`, a file or a folder, in order of name, where part10 comes after part9.

    Raises:
        SourceError: nothing there, several formats, or a file that does not hold what docs/import.md asks for.
    """
    paths = _find(place)
    formats = {path.suffix: path for path in paths}
    if len({FORMATS[suffix] for suffix in formats}) > 1:
        first, second, *_ = formats.values()
        raise SourceError(f"{place}: holds files of several formats, such as {first.name} and {second.name}; give each a folder of its own")
    files = [FORMATS[path.suffix](path, key) for path in paths]
    for file in files:
        _check_alike(files[0], file)
    return files


def _find(place: Path) -> list[Path]:
    if not place.exists():
        raise SourceError(f"{place}: no such file or folder; set extract.path to a folder of {_NAMES} files, or to one of them")
    if place.is_file():
        if place.suffix not in FORMATS:
            raise SourceError(f"{place}: extract.path must end in {_NAMES}, or be a folder of such files")
        return [place]
    found = (path for path in place.rglob("*") if path.suffix in FORMATS and path.is_file() and not _is_hidden(path.relative_to(place)))
    paths = sorted((path for path in found if not path.name.endswith(f".{IMAGE}.npy")), key=_natural)
    if not paths:
        raise SourceError(f"{place}: there are no {_NAMES} files in this folder; change extract.path")
    return paths


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Numbers in names count as numbers: writers of per-batch parts rarely pad them."""
    return [(int(text), "") if text.isdigit() else (-1, text) for text in re.split(r"([0-9]+)", path.as_posix())]


def _check_alike(first: ActivationFile, other: ActivationFile) -> None:
    if first.shape[1:] != other.shape[1:]:
        raise SourceError(
            f"{first.path} and {other.path} differ in shape: {_text(first.shape)} and {_text(other.shape)}; "
            "all files of one import must agree in everything but their number of entries"
        )
    if first.has_images != other.has_images:
        with_, without = (first, other) if first.has_images else (other, first)
        raise SourceError(f"{with_.path} has {IMAGE!r} ids and {without.path} has none; give them to all files or to none")


def _text(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"


def _check(path: Path, shape: tuple[int, ...], dtype: Any, is_float: bool) -> None:
    if not is_float:
        raise SourceError(f"{path}: holds {dtype}; activations must be float16, bfloat16, float32 or float64")
    if len(shape) not in (2, 3):
        raise SourceError(f"{path}: has shape {_text(shape)}; activations must be (tokens, d_model) or (images, tokens, d_model)")
    if 0 in shape:
        raise SourceError(f"{path}: is empty, its shape is {_text(shape)}; remove it")


def _check_images(path: Path, shape: tuple[int, ...], n: int, dtype: Any, is_integer: bool) -> None:
    if shape != (n,) or not is_integer:
        raise SourceError(
            f"{path}: {IMAGE!r} is {dtype} of shape {_text(shape)}; it must be whole numbers, one for each of the {n} entries, shape ({n},)"
        )


def _choose(path: Path, key: str | None, known: Mapping[str, str], what: str) -> str:
    """The name of the activations among `known`: names of tensors or columns, and what they are."""
    listed = ", ".join(f"{name} ({is_})" for name, is_ in known.items()) or "nothing"
    if key is not None:
        if key not in known:
            raise SourceError(f"{path}: extract.key is {key!r}, and there is no such {what}; the file has {listed}")
        return key
    names = [name for name in known if name != IMAGE]
    if len(names) != 1:
        raise SourceError(f"{path}: which {what} holds the activations? Set extract.key; the file has {listed}")
    return names[0]


def _refuse_key(path: Path, key: str | None) -> None:
    if key is not None:
        raise SourceError(f"{path}: extract.key is {key!r}, and the file holds one array without a name; set extract.key to null")


class _Sliced:
    """A format from which any run of entries can be read."""

    path: Path
    shape: tuple[int, ...]
    has_images: bool

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        """Activations and images, to be sliced; what is mapped into memory goes when the block ends."""
        raise NotImplementedError
        yield

    def iter_images(self, n: int) -> Iterator[np.ndarray]:
        for start in range(0, self.shape[0], n):
            with self._open() as (_, images):
                yield _as_images(images[start : start + n])

    def iter_pieces(self, n: int, wanted: Container[int]) -> Iterator[Piece]:
        for index, start in enumerate(range(0, self.shape[0], n)):
            if index in wanted:
                with self._open() as (x, images):
                    numbers = _as_images(images[start : start + n]) if self.has_images else None
                    yield index, _as_tensor(x[start : start + n]), numbers


def _as_tensor(x: Any) -> Tensor:
    """A copy, so that nothing is left of the file in memory, in this machine's byte order."""
    return x.clone() if isinstance(x, Tensor) else torch.from_numpy(np.array(x, x.dtype.newbyteorder("="), order="C"))


def _as_images(images: Any) -> np.ndarray:
    return np.array(images.numpy() if isinstance(images, Tensor) else images).astype(np.int64)


class Npy(_Sliced):
    """An array; images in a file beside it: `x.npy` and `x.image.npy`."""

    def __init__(self, path: Path, key: str | None):
        self.path = path
        self._beside = path.with_name(f"{path.stem}.{IMAGE}.npy")
        _refuse_key(path, key)
        x = _map(path)
        self.shape = x.shape
        self.has_images = self._beside.exists()
        _check(path, x.shape, x.dtype, x.dtype.kind == "f" and x.dtype.itemsize <= 8)
        if self.has_images:
            images = _map(self._beside)
            _check_images(self._beside, images.shape, len(x), images.dtype, images.dtype.kind in "iu")

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        yield _map(self.path), _map(self._beside) if self.has_images else None


def _map(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        what = "an array of Python objects" if "objects" in str(error) else f"not a whole npy file ({error})"
        raise SourceError(f"{path}: {what}; write it with np.save, an array of float16 or float32") from None


class Safetensors(_Sliced):
    """A file of named tensors."""

    def __init__(self, path: Path, key: str | None):
        self.path = path
        with self._reading() as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            known = {name: f"{part.get_dtype()} {_text(tuple(part.get_shape()))}" for name, part in slices.items()}
            self._name = _choose(path, key, known, "tensor")
            self.shape, dtype = tuple(slices[self._name].get_shape()), slices[self._name].get_dtype()
            self.has_images = IMAGE in slices
            _check(path, self.shape, dtype, dtype in ("F16", "BF16", "F32", "F64"))
            if self.has_images:
                shape, dtype = tuple(slices[IMAGE].get_shape()), slices[IMAGE].get_dtype()
                _check_images(path, shape, self.shape[0], dtype, dtype in ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"))

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        with self._reading() as file:
            yield file.get_slice(self._name), file.get_slice(IMAGE) if self.has_images else None

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise SourceError(f"{self.path}: not a whole safetensors file ({error}); write it again") from None


class Pt(_Sliced):
    """What torch.save wrote: a tensor, or a dict of tensors. Never unpickled: weights_only."""

    def __init__(self, path: Path, key: str | None):
        self.path = path
        self._key = key
        self._held: Any = None
        x, images = self._tensors()
        self.shape = tuple(x.shape)
        self.has_images = images is not None
        _check(path, self.shape, x.dtype, x.dtype in FLOATS and x.layout == torch.strided)
        if images is not None:
            is_integer = not (images.is_floating_point() or images.is_complex() or images.dtype == torch.bool)
            _check_images(path, tuple(images.shape), self.shape[0], images.dtype, is_integer)

    def iter_images(self, n: int) -> Iterator[np.ndarray]:
        """See `ActivationFile`."""
        with self._holding():
            yield from super().iter_images(n)

    def iter_pieces(self, n: int, wanted: Container[int]) -> Iterator[Piece]:
        """See `ActivationFile`."""
        with self._holding():
            yield from super().iter_pieces(n, wanted)

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        yield self._held or self._tensors()

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """Torch's old format, before 1.6, cannot be mapped: the whole file is in memory while it is read."""
        self._held = None if zipfile.is_zipfile(self.path) else self._tensors()
        try:
            yield
        finally:
            self._held = None

    def _tensors(self) -> tuple[Tensor, Tensor | None]:
        found = _load(self.path)
        if isinstance(found, Tensor):
            _refuse_key(self.path, self._key)
            return found.detach(), None
        if not isinstance(found, Mapping):
            raise SourceError(f"{self.path}: holds a {type(found).__name__}; {_HOW_TO_SAVE}")
        tensors = {name: value.detach() for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
        known = {name: f"{str(value.dtype).removeprefix('torch.')} {_text(tuple(value.shape))}" for name, value in tensors.items()}
        return tensors[_choose(self.path, self._key, known, "tensor")], tensors.get(IMAGE)


_HOW_TO_SAVE = 'save a tensor, torch.save(x, path), or tensors by name, torch.save({"x": x, "image": image}, path)'


def _load(path: Path) -> Any:
    is_zip = zipfile.is_zipfile(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        if not is_zip and not _is_pickle(path):
            raise SourceError(f"{path}: not a whole file of torch.save; write it again") from None
        raise SourceError(f"{path}: needs pickle, which can run any code, so it is not opened; {_HOW_TO_SAVE}") from None
    except (RuntimeError, EOFError, ValueError, OSError, LookupError, TypeError, AttributeError) as error:  # of a parser of any bytes
        raise SourceError(f"{path}: not a whole file of torch.save ({str(error).partition(chr(10))[0]}); write it again") from None


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


class ParquetFile:
    """A column of vectors: fixed-width bytes, lists or fixed-size lists; images in a column of their own."""

    def __init__(self, path: Path, key: str | None):
        self.path = path
        with _parquet(path) as file:
            schema, n_rows = file.schema_arrow, file.metadata.num_rows
            known = {field.name: str(field.type) for field in schema if key is not None or _is_vector(field.type)}
            self._name = _choose(path, key, known, "column")
            type_ = schema.field(self._name).type
            if not _is_vector(type_):
                raise SourceError(f"{path}: column {self._name} holds {type_}; activations must be fixed-width bytes or lists of floats")
            self._bytes_dtype = _bytes_dtype(path, schema) if _is_bytes(type_) else None
            self._width = self._width_of(file, type_) if n_rows else 0
            self.has_images = IMAGE in schema.names
            if self.has_images:
                images = schema.field(IMAGE).type
                _check_images(path, (n_rows,), n_rows, images, pa.types.is_integer(images))
        self.shape = (n_rows, self._width)
        _check(path, self.shape, type_, True)

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
        """Tables of n rows, wherever row groups end, with the number of their first row."""
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
        return rows[IMAGE].to_numpy().astype(np.int64)

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
            raise SourceError(f"{self.path}: column {self._name} is {lengths[odd[0]]} bytes wide, which are no {self._bytes_dtype.name}s")
        return lengths // self._bytes_dtype.itemsize

    def _width_of(self, file: pq.ParquetFile, type_: pa.DataType) -> int:
        """Numbers in the first row."""
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
        # buffered reads: by default whole row groups are held, and one may be the whole file
        with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path}: cannot be read as Parquet ({error}); write it again") from None


def _is_vector(type_: pa.DataType) -> bool:
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        return pa.types.is_floating(type_.value_type)
    return _is_bytes(type_)


def _is_bytes(type_: pa.DataType) -> bool:
    return pa.types.is_fixed_size_binary(type_) or pa.types.is_binary(type_) or pa.types.is_large_binary(type_)


def _bytes_dtype(path: Path, schema: pa.Schema) -> np.dtype:
    """What the bytes are: the schema's metadata `dtype`, as Ommatid's own artefacts have it, or float16."""
    name = (schema.metadata or {}).get(b"dtype", b"float16").decode()
    if name not in ("float16", "float32", "float64"):
        raise SourceError(f"{path}: the schema's metadata says dtype={name}; it must be float16, float32 or float64")
    return np.dtype(name).newbyteorder("<")


FORMATS: Mapping[str, Any] = {".npy": Npy, ".safetensors": Safetensors, ".pt": Pt, ".pth": Pt, ".parquet": ParquetFile}
_NAMES = ", ".join(FORMATS)
