"""Folders that hold artefacts and images: on this machine's disk (`disk.py`), or behind a URL such as s3://bucket/prefix (`remote.py`).

No file appears in a folder before it is complete. `base.py` defines the interface: callers need not know which kind of folder they use.
"""

from pathlib import Path

from ommatid.errors import ArtefactError, without_credentials
from ommatid.store.filesystem.base import (
    READ_BYTES,
    Entry,
    Folder,
    Ranges,
    cache_folder,
    in_words,
    is_temporary,
    nearest_folder,
    replace_bytes,
    replace_text,
    temporary_path,
    writing,
)
from ommatid.store.filesystem.disk import Disk, sync
from ommatid.store.filesystem.remote import Remote

__all__ = [
    "READ_BYTES",
    "Entry",
    "Folder",
    "Ranges",
    "cache_folder",
    "in_words",
    "is_temporary",
    "nearest_folder",
    "open_folder",
    "replace_bytes",
    "replace_text",
    "sync",
    "temporary_path",
    "writing",
]


def open_folder(place: "Folder | Path | str") -> Folder:
    """Return the folder at a path or URL, which need not exist. A `Folder` is returned unchanged.

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
