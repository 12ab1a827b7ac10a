"""Folders that hold artefacts and images: on this machine's disk (`disk.py`), or behind a URL such as s3://bucket/prefix (`remote.py`).

A file appears in a folder whole or not at all. `base.py` defines the interface; callers need not know which kind of folder they hold.
"""

from pathlib import Path

from ommatid.errors import ArtefactError, without_credentials
from ommatid.store.filesystem.base import (
    READ_BYTES,
    Entry,
    Folder,
    Ranges,
    aside_of,
    cache_folder,
    in_words,
    is_aside,
    nearest_folder,
    writing,
)
from ommatid.store.filesystem.disk import Disk, sync
from ommatid.store.filesystem.remote import Remote

__all__ = [
    "READ_BYTES",
    "Entry",
    "Folder",
    "Ranges",
    "aside_of",
    "cache_folder",
    "in_words",
    "is_aside",
    "nearest_folder",
    "open_folder",
    "sync",
    "writing",
]


def open_folder(place: "Folder | Path | str") -> Folder:
    """Return the folder at a path or URL, which need not exist; a `Folder` is returned as it is.

    Raises:
        ArtefactError: The URL carries credentials, its protocol is unknown, or the library for its protocol is not installed.
    """
    if isinstance(place, Folder):
        return place
    text = str(place)
    if isinstance(place, str) and "://" in text:
        if (bare := without_credentials(text)) != text:
            raise ArtefactError(
                f"{bare}: the URL contains a user name, a password or a query, which would be written wherever the URL is; remove it"
            )
        protocol, _, rest = text.partition("://")
        return Disk(Path(rest)) if protocol == "file" else Remote(text.rstrip("/"))
    return Disk(Path(place))
