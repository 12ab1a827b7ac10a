"""A source: numbered items that can be read, one after the other, wherever the images come from."""

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
