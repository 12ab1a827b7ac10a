"""The interface of a file of activations, whatever its format, and the checks that every file must pass. See docs/users/activations.md."""

import re
from collections.abc import Collection, Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from ommatid.errors import SourceError, gist

IMAGE = "image"
"""Name of the tensor or column that holds the image of each row, or of each entry of the first dimension."""

Piece = tuple[int, Tensor, np.ndarray | None]
"""Index of a piece, its activations, `(entries, ...)`, and their images, `(entries,)` int64, or None if the file does not hold them."""


class ActivationFile(Protocol):
    """A file of activations. Its entries are tokens if `shape` has two dimensions, images if it has three."""

    path: Path
    paths: tuple[Path, ...]
    """All files that are read: `path`, and the file of images beside it if there is one."""
    shape: tuple[int, ...]
    """Shape of the activations, `(tokens, d_model)` or `(images, tokens, d_model)`."""
    has_images: bool
    """Whether the file holds the image of each entry."""
    unread: tuple[str, ...]
    """Names of the tensors or columns that are not read."""

    def iter_images(self, n: int) -> Iterator[np.ndarray]:
        """Yield the images of all entries in order, `n` entries at a time. The file must hold images."""
        ...

    def iter_pieces(self, n: int, wanted: Container[int]) -> Iterator[Piece]:
        """Yield the pieces of `n` entries whose index is in `wanted`, in order."""
        ...


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block, such as that of a dangling link, into an error that names the file.

    Raises:
        SourceError: The block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({gist(error)}); repair or remove it") from None


def text_of(shape: tuple[int, ...]) -> str:
    """Format a shape, such as (100, 768)."""
    return f"({', '.join(map(str, shape))})"


def check_shape(path: Path, shape: tuple[int, ...], dtype: Any, is_float: bool) -> None:
    """Check that a file holds floats, either one matrix or one for each image.

    Raises:
        SourceError: The file holds something else, or is empty.
    """
    if not is_float:
        raise SourceError(f"{path}: holds {dtype}; activations must be float16, bfloat16, float32 or float64")
    if len(shape) not in (2, 3):
        raise SourceError(f"{path}: has shape {text_of(shape)}; activations must be (tokens, d_model) or (images, tokens, d_model)")
    if 0 in shape:
        raise SourceError(f"{path}: is empty, its shape is {text_of(shape)}; remove it")


def check_images(path: Path, shape: tuple[int, ...], n: int, dtype: Any, is_integer: bool) -> None:
    """Check that a file's images are whole numbers, one for each of `n` entries.

    Raises:
        SourceError: The images have another type or shape.
    """
    if shape != (n,) or not is_integer:
        raise SourceError(
            f"{path}: {IMAGE!r} is {dtype} of shape {text_of(shape)}; it must be whole numbers, one for each of the {n} entries"
        )


def as_int64(images: np.ndarray) -> np.ndarray:
    """Convert whole numbers to int64. Larger ones become its maximum, which is refused later, like all numbers that are too large."""
    top = np.iinfo(np.int64).max
    return (images.clip(max=top) if images.dtype == np.uint64 else images).astype(np.int64)


def choose(path: Path, key: str | None, known: Mapping[str, str], what: str) -> str:
    """Choose the tensor or column that holds the activations.

    Args:
        path: Path of the file.
        key: `extract.key`, the name that the user set; None if there should be only one candidate.
        known: Descriptions of the tensors or columns, by name.
        what: "tensor" or "column", for messages.

    Returns:
        The name of the tensor or column.

    Raises:
        SourceError: No tensor or column is named `key`; or there is no key, and not exactly one candidate.
    """
    if not known:
        raise SourceError(
            f"{path}: has no {what} that can hold activations, which are floats of shape (tokens, d_model); see docs/users/activations.md"
        )
    listed = ", ".join(f"{name} ({description})" for name, description in known.items())
    if key is not None:
        if key not in known:
            raise SourceError(f"{path}: extract.key is {key!r}, and there is no such {what}; the file has {listed}")
        return key
    names = [name for name in known if name != IMAGE]
    if len(names) != 1:
        raise SourceError(f"{path}: which {what} holds the activations? Set extract.key; the file has {listed}")
    return names[0]


def find_unread(path: Path, names: Collection[str], key: str) -> tuple[str, ...]:
    """Find the tensors or columns of a file other than the activations and `image`.

    Args:
        path: Path of the file.
        names: Names of its tensors or columns.
        key: Name of the activations.

    Returns:
        The names of the tensors or columns that are not read.

    Raises:
        SourceError: There is no `image`, but a name that suggests images. If it were ignored, every entry would count as an image.
    """
    unread = tuple(name for name in names if name not in (key, IMAGE))
    for name in unread:
        if _IMAGES.fullmatch(name) and IMAGE not in names:
            raise SourceError(
                f"{path}: {name!r} is not read; call it {IMAGE!r} if it says which image an entry comes from, or leave it out"
            )
    return unread


_IMAGES = re.compile(r"(image|img|sample)s?[ _.-]?(id|idx|index|number|no|nr)?(e?s)?|idx|index|indices|ids?", re.IGNORECASE)
"""Names that other programs give to what is called `image` here."""


def refuse_key(path: Path, key: str | None) -> None:
    """Check that no key is set for a file with a single nameless array.

    Raises:
        SourceError: A key is set.
    """
    if key is not None:
        raise SourceError(f"{path}: extract.key is {key!r}, and the file holds one array without a name; set extract.key to null")
