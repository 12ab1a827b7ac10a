"""Sources of images and the items that they yield.

A taxonomy path lists the classes of an image from the root to its own, separated by /, such as animal/mammal/dog.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import numpy as np

from ommatid.config import ImageSource
from ommatid.images.reference import Reference


@dataclass(frozen=True)
class Item:
    """One image of a source, not read yet."""

    path: str
    """Path relative to the source."""
    read: Callable[[], bytes]
    """Returns the encoded bytes; may be called in another thread; raises OSError or Unreadable."""
    label: str | None = None
    """Class, if the source has one."""
    captions: tuple[str, ...] = ()
    """Captions in the source."""
    taxonomy: str | None = None
    """Taxonomy path as `normalise` returns it, if the source has one."""
    reference: Reference | None = None
    """Where the bytes are, without their checksum; None if they are in no file, or not as they are."""
    token: str = ""
    """Identifies the bytes before they are read: the same token always means the same bytes; empty if nothing does."""
    is_unchanged: Callable[[], bool] = lambda: True
    """Returns whether the token still identifies what `read` returns, and not only what was there when it was made."""


class Source(Protocol):
    """A source of images."""

    total: int
    """Number of items."""
    fingerprint: str
    """Value that changes with the content: an interrupted run is only continued on the same content."""
    notices: Sequence[str]
    """Sentences about what in the source is not used."""

    def names(self) -> Iterable[str] | None:
        """Return the path of every item, in order, without reading the items; None if the source does not grow."""
        ...

    def iter_items(self, positions: Sequence[int]) -> Iterator[Item]:
        """Iterate over the items at these positions, which must ascend within 0 to total - 1."""
        ...


def open_source(params: ImageSource) -> Source:
    """Open the source that the params describe, by `open_source` of the module named after its kind.

    Relative paths are relative to the current directory.

    Args:
        params: The `images.source` section of the params.

    Returns:
        The source.

    Raises:
        SourceError: The source is missing or empty, or differs from what the params say.
    """
    return import_module(f"ommatid.images.{params.kind}").open_source(params)


def choose(source: Source, limit: int | None) -> Sequence[int]:
    """Return the positions of at most `limit` items of a source, in order.

    Of a source that may grow, these are the items whose paths have the smallest hashes, so that one item more or less exchanges at most
    one of those chosen. Of any other source they are evenly spread.
    """
    names = source.names()
    if limit is None or limit >= source.total or names is None:
        return spread(source.total, limit)
    hashes = (hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest() for name in names)
    values = np.frombuffer(b"".join(hashes), dtype=">u8")
    return np.sort(np.argsort(values, kind="stable")[:limit]).tolist()


def spread(total: int, limit: int | None) -> Sequence[int]:
    """Return the positions of at most `limit` of `total` items, evenly spread, so that a source sorted by class stays balanced."""
    if limit is None or limit >= total:
        return range(total)
    return [i * total // limit for i in range(limit)]


def normalise(path: str | None) -> str | None:
    """Strip blanks around the classes of a taxonomy path and slashes at its ends.

    Paths may differ in length, and an image may have none. A nameless class between two others is refused, because levels are compared
    by position and it is impossible to tell whether two nameless classes are the same.

    Args:
        path: Classes separated by /, or None.

    Returns:
        The path, or None if nothing is left of it.

    Raises:
        ValueError: A class in the middle has no name.
    """
    if not path or not (trimmed := path.strip().strip("/").strip()):
        return None
    classes = [name.strip() for name in trimmed.split("/")]
    if not all(classes):
        raise ValueError(f"the taxonomy {path!r} has a class without a name between two slashes; name it, or leave the whole path empty")
    return "/".join(classes)
