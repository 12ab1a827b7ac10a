"""Array formats from which any slice can be read: npy, safetensors, and files written by torch.save."""

import pickle
import zipfile
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ommatid.errors import SourceError, gist
from ommatid.extract.from_files.base import (
    IMAGE,
    Piece,
    as_int64,
    check_images,
    check_shape,
    choose,
    find_unread,
    reading,
    refuse_key,
    text_of,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Sliced:
    """A file from which any slice of entries can be read."""

    path: Path
    paths: tuple[Path, ...]
    shape: tuple[int, ...]
    has_images: bool
    unread: tuple[str, ...] = ()

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        """Yield activations and images, from which slices can be taken. Memory maps are released when the block ends."""
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
    """Copy values to a tensor in this machine's byte order, so that the file does not stay mapped."""
    return x.clone() if isinstance(x, Tensor) else torch.from_numpy(np.array(x, x.dtype.newbyteorder("="), order="C"))


def _as_images(images: Any) -> np.ndarray:
    return as_int64(np.array(images.numpy() if isinstance(images, Tensor) else images))


class Npy(_Sliced):
    """An npy file `x.npy` with one array. Its images may be in `x.image.npy` beside it."""

    def __init__(self, path: Path, key: str | None):
        self.path = path
        self._beside = path.with_name(f"{path.stem}.{IMAGE}.npy")
        refuse_key(path, key)
        x = _map(path)
        self.shape = x.shape
        self.has_images = self._beside.exists()
        self.paths = (path, self._beside) if self.has_images else (path,)
        check_shape(path, x.shape, x.dtype, x.dtype.kind == "f" and x.dtype.itemsize <= 8)
        if self.has_images:
            images = _map(self._beside)
            check_images(self._beside, images.shape, len(x), images.dtype, images.dtype.kind in "iu")

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        yield _map(self.path), _map(self._beside) if self.has_images else None


def _map(path: Path) -> np.ndarray:
    how = "write it with np.save, an array of float16 or float32"
    with reading(path), path.open("rb") as file:
        if file.read(len(_NPY)) != _NPY:
            raise SourceError(f"{path}: not a complete npy file (it does not begin like one); {how}")
    try:
        with reading(path):
            return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        what = "an array of Python objects" if "objects" in str(error) else f"not a complete npy file ({gist(error)})"
        raise SourceError(f"{path}: {what}; {how}") from None


_NPY = b"\x93NUMPY"


class Safetensors(_Sliced):
    """A safetensors file, which holds tensors by name."""

    def __init__(self, path: Path, key: str | None):
        self.path = path
        self.paths = (path,)
        with self._reading() as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            known = {name: f"{part.get_dtype()} {text_of(tuple(part.get_shape()))}" for name, part in slices.items()}
            self._name = choose(path, key, known, "tensor")
            self.shape, dtype = tuple(slices[self._name].get_shape()), slices[self._name].get_dtype()
            self.has_images = IMAGE in slices
            self.unread = find_unread(path, slices, self._name)
            check_shape(path, self.shape, dtype, dtype in ("F16", "BF16", "F32", "F64"))
            if self.has_images:
                shape, dtype = tuple(slices[IMAGE].get_shape()), slices[IMAGE].get_dtype()
                check_images(path, shape, self.shape[0], dtype, dtype in ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"))

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        with self._reading() as file:
            yield file.get_slice(self._name), file.get_slice(IMAGE) if self.has_images else None

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        try:
            with reading(self.path), safe_open(self.path, framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise SourceError(f"{self.path}: not a complete safetensors file ({gist(error)}); write it again") from None


class Pt(_Sliced):
    """A file in which torch.save wrote a tensor or a dict of tensors. It is loaded with `weights_only`, so that no pickled code runs."""

    def __init__(self, path: Path, key: str | None):
        self.path = path
        self.paths = (path,)
        self._key = key
        self._held: Any = None
        x, images = self._tensors()
        self.shape = tuple(x.shape)
        self.has_images = images is not None
        if x.layout != torch.strided:
            raise SourceError(f"{path}: holds a sparse tensor ({x.layout}); save it dense, x.to_dense()")
        check_shape(path, self.shape, x.dtype, x.dtype in FLOATS)
        if images is not None:
            is_integer = not (images.is_floating_point() or images.is_complex() or images.dtype == torch.bool)
            check_images(path, tuple(images.shape), self.shape[0], images.dtype, is_integer)

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
        """Hold the whole file in memory during the block if it has the format from before torch 1.6, which cannot be mapped."""
        self._held = None if zipfile.is_zipfile(self.path) else self._tensors()
        try:
            yield
        finally:
            self._held = None

    def _tensors(self) -> tuple[Tensor, Tensor | None]:
        found = _load(self.path)
        if isinstance(found, Tensor):
            refuse_key(self.path, self._key)
            return found.detach(), None
        if not isinstance(found, Mapping):
            raise SourceError(f"{self.path}: holds a {type(found).__name__}; {_HOW_TO_SAVE}")
        tensors = {name: value.detach() for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}
        known = {name: f"{str(value.dtype).removeprefix('torch.')} {text_of(tuple(value.shape))}" for name, value in tensors.items()}
        name = choose(self.path, self._key, known, "tensor")
        self.unread = find_unread(self.path, [str(key) for key in found], name)
        return tensors[name], self._images(found[IMAGE]) if IMAGE in found else None

    def _images(self, found: Any) -> Tensor:
        """Return the images as a tensor, given a tensor, or a list or tuple of whole numbers.

        Raises:
            SourceError: The images are none of these.
        """
        if isinstance(found, Tensor):
            return found.detach()
        if isinstance(found, list | tuple) and all(type(number) is int for number in found):
            with suppress(RuntimeError, ValueError, OverflowError):  # Raised for a number that does not fit into 64 bits.
                return torch.tensor(found, dtype=torch.int64)
        raise SourceError(
            f"{self.path}: {IMAGE!r} is a {type(found).__name__}; it must be a tensor or a list of whole numbers, one for each entry"
        )


_HOW_TO_SAVE = 'save a tensor, torch.save(x, path), or tensors by name, torch.save({"x": x, "image": image}, path)'


def _load(path: Path) -> Any:
    with reading(path), path.open("rb") as file:
        is_zip = zipfile.is_zipfile(file)
    try:
        with reading(path):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:
        if not is_zip and not _is_pickle(path):
            raise SourceError(f"{path}: not a complete file written by torch.save; write it again") from None
        raise SourceError(f"{path}: needs pickle, which can run any code, so it is not opened; {_HOW_TO_SAVE}") from None
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:  # Raised for arbitrary bytes.
        raise SourceError(f"{path}: not a complete file written by torch.save ({gist(error)}); write it again") from None


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\x80"
