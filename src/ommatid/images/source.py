"""A path in a taxonomy: classes from the root to the image's own, separated by /, such as animal/mammal/dog."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Item:
    """One image of a source, not read yet."""

    path: str
    """Where it is in the source, relative to it."""
    read: Callable[[], bytes]
    """Gives the encoded bytes; may be called in another thread; raises OSError, Unreadable."""
    label: str | None = None
    """Class, if the source knows it."""
    captions: tuple[str, ...] = ()
    """Captions, as many as the source knows."""
    taxonomy: str | None = None
    """Path of classes from the root, separated by /, as `taxonomy.normalise` gives it, if the source knows it."""


class Source(Protocol):
    """Where images come from."""

    total: int
    """Items there are."""
    fingerprint: str
    """Changes when the content does: a run that was killed is only continued on the same content."""
    notices: Sequence[str]
    """What of the source is not used, a sentence each."""

    def iter_items(self, positions: Sequence[int]) -> Iterator[Item]:
        """The items at these positions, which ascend from 0 to total - 1, in order."""
        ...


def spread(total: int, limit: int | None) -> Sequence[int]:
    """Positions of at most `limit` of `total` items, evenly spread: a source sorted by class keeps its balance."""
    if limit is None or limit >= total:
        return range(total)
    return [i * total // limit for i in range(limit)]


def normalise(path: str | None) -> str | None:
    """The path without blanks around its classes and without a slash at either end; None where nothing is left.

    Paths may be of different lengths, and images may have none. A class without a name between two others is refused: levels
    are compared by their place, and whether two such classes are the same nobody can tell.

    Raises:
        ValueError: a class in the middle has no name.
    """
    if not path or not (trimmed := path.strip().strip("/").strip()):
        return None
    classes = [name.strip() for name in trimmed.split("/")]
    if not all(classes):
        raise ValueError(f"the taxonomy {path!r} has a class without a name between two slashes; name it, or leave the whole path empty")
    return "/".join(classes)
