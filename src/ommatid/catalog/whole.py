"""Files that are written whole or not at all."""

import os
from pathlib import Path

from ommatid.errors import QueryError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file aside and move it into its place; folders on the way are made.

    Raises:
        QueryError: it cannot be written there.
    """
    aside = path.with_name(path.name + ".tmp")
    if blocked := next((folder for folder in path.parents if folder.exists() and not folder.is_dir()), None):
        raise QueryError(f"{path}: cannot be written: {blocked} is no folder; name another place with --to FILE")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(content)
        os.replace(aside, path)
    except OSError as error:
        if aside.is_file():
            aside.unlink()
        raise QueryError(f"{path}: cannot be written: {error.strerror}; name another place with --to FILE") from None
