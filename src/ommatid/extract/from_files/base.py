"""What every file of activations is to an import, whatever its format, and what is refused in each. See docs/users/activations.md."""

import re
from collections.abc import Collection, Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ommatid.errors import SourceError, gist

IMAGE = "image"
"""The tensor or column that says which image a row, or an entry of the first dimension, comes from."""

Piece = tuple[int, Tensor, np.ndarray | None]
"""Index of the piece, its activations (entries, ...) and their images (entries,) int64."""


class ActivationFile(Protocol):
    """One file. Its entries are tokens where `shape` has two dimensions, images where it has three."""

    path: Path
    paths: tuple[Path, ...]
    """Every file that is read: `path`, and what lies beside it."""
    shape: tuple[int, ...]
    """(tokens, d_model) or (images, tokens, d_model)."""
    has_images: bool
    """Whether it says which image each entry comes from."""
    others: tuple[str, ...]
    """Names of tensors or columns in it that are not read."""

    def iter_images(self, n: int) -> Iterator[np.ndarray]:
        """The image of every entry in order, `n` entries a piece; only where `has_images`."""
        ...

    def iter_pieces(self, n: int, wanted: Container[int]) -> Iterator[Piece]:
        """The file in pieces of `n` entries, in order; only the wanted ones."""
        ...


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the disk refuses (a link that leads nowhere, no rights) into an error that says so. Raises SourceError."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({gist(error)}); mend or remove it") from None


def text_of(shape: tuple[int, ...]) -> str:
    """Such as (100, 768)."""
    return f"({', '.join(map(str, shape))})"


def check_shape(path: Path, shape: tuple[int, ...], dtype: Any, is_float: bool) -> None:
    """Refuse what is no matrix of floats or one for each image. Raises SourceError."""
    if not is_float:
        raise SourceError(f"{path}: holds {dtype}; activations must be float16, bfloat16, float32 or float64")
    if len(shape) not in (2, 3):
        raise SourceError(f"{path}: has shape {text_of(shape)}; activations must be (tokens, d_model) or (images, tokens, d_model)")
    if 0 in shape:
        raise SourceError(f"{path}: is empty, its shape is {text_of(shape)}; remove it")


def check_images(path: Path, shape: tuple[int, ...], n: int, dtype: Any, is_integer: bool) -> None:
    """Refuse images that are no whole numbers, one for each of `n` entries. Raises SourceError."""
    if shape != (n,) or not is_integer:
        raise SourceError(
            f"{path}: {IMAGE!r} is {dtype} of shape {text_of(shape)}; it must be whole numbers, one for each of the {n} entries"
        )


def as_int64(images: np.ndarray) -> np.ndarray:
    """Whole numbers of any type as int64; what that cannot hold becomes its largest, and is refused like any image that is too large."""
    top = np.iinfo(np.int64).max
    return (images.clip(max=top) if images.dtype == np.uint64 else images).astype(np.int64)


def choose(path: Path, key: str | None, known: Mapping[str, str], what: str) -> str:
    """The name of the activations among `known`: names of tensors or columns, and what they are. Raises SourceError."""
    if not known:
        raise SourceError(
            f"{path}: no {what} of it can hold activations; it must be floats of shape (tokens, d_model), or see docs/users/activations.md"
        )
    listed = ", ".join(f"{name} ({is_})" for name, is_ in known.items())
    if key is not None:
        if key not in known:
            raise SourceError(f"{path}: extract.key is {key!r}, and there is no such {what}; the file has {listed}")
        return key
    names = [name for name in known if name != IMAGE]
    if len(names) != 1:
        raise SourceError(f"{path}: which {what} holds the activations? Set extract.key; the file has {listed}")
    return names[0]


def others_of(path: Path, names: Collection[str], key: str) -> tuple[str, ...]:
    """What a file holds beside the activations `key` and `image`.

    Raises:
        SourceError: something that looks like the images by another name, without which every entry would count as an image.
    """
    others = tuple(name for name in names if name not in (key, IMAGE))
    for name in others:
        if _IMAGES.fullmatch(name) and IMAGE not in names:
            raise SourceError(
                f"{path}: {name!r} is not read; call it {IMAGE!r} if it says which image an entry comes from, or leave it out"
            )
    return others


_IMAGES = re.compile(r"(image|img|sample)s?[ _.-]?(id|idx|index|number|no|nr)?(e?s)?|idx|index|indices|ids?", re.IGNORECASE)
"""Names by which other programs call what is `image` here."""


def refuse_key(path: Path, key: str | None) -> None:
    """Refuse a key for an array that has no name. Raises SourceError."""
    if key is not None:
        raise SourceError(f"{path}: extract.key is {key!r}, and the file holds one array without a name; set extract.key to null")
