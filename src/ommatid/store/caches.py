"""Caches: where each lies, how large it may grow, and which of its entries `ommatid gc` removes.

`CACHES` lists every cache of Ommatid, so that one verb shows and cleans them all. Each may be deleted at any time: what is missing is
computed or fetched again.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import filelock

from ommatid.errors import ConfigError
from ommatid.store.artefact import CACHE
from ommatid.store.filesystem import cache_folder, in_words, is_temporary, nearest_folder
from ommatid.store.workspace import artefact_of

DAY = 24 * 3600.0
"""Seconds per day."""
UNFINISHED = DAY
"""Seconds since its last change after which an unfinished file counts as left behind by a process that died."""
SHARE = 0.1
"""Share of the disk that cached activations may take if OMMATID_CACHE_GB is not set."""
MOST = 50e9
"""Largest number of bytes of cached activations if OMMATID_CACHE_GB is not set."""

IMAGES_BYTES = 4 * 2**30
"""Size of what runs found in image files from which the entries unused for longest are removed; it holds about a million images."""


@dataclass(frozen=True)
class CacheEntry:
    """A file or folder of a cache, which is removed as a whole."""

    path: Path
    """Path of the entry."""
    bytes: int
    """Bytes that it takes."""
    used: float
    """Time of its last use, in seconds since 1970."""

    def remove(self) -> int:
        """Remove the entry, and return the bytes that this freed: 0 if another process removed it first, or it may not be removed."""
        with suppress(OSError):
            if self.path.is_dir():
                shutil.rmtree(self.path)
            else:
                self.path.unlink()
            return self.bytes
        return 0


def children(folder: Path) -> Iterator[CacheEntry]:
    """Yield each file and folder of a cache's folder as an entry, which was last used when its newest file changed."""
    for path in _listed(folder):
        with suppress(OSError):
            files = [file.stat() for file in (path, *path.rglob("*"))]
            yield CacheEntry(path, sum(file.st_size for file in files), max(file.st_mtime for file in files))


def files_below(folder: Path) -> Iterator[CacheEntry]:
    """Yield each file at any depth of a cache's folder as an entry; a reader sets its time of change to record the use."""
    for path in folder.rglob("*"):
        with suppress(OSError):
            status = path.stat()
            if path.is_file():
                yield CacheEntry(path, status.st_size, status.st_mtime)


@dataclass(frozen=True)
class Cache:
    """A cache of this machine."""

    name: str
    """Name that `ommatid gc` prints."""
    about: str
    """What it holds, in a few words."""
    folder: Callable[[Path], Path]
    """Function from the root of a study to the folder of the cache, which need not exist."""
    entries: Callable[[Path], Iterator[CacheEntry]] = children
    """Function from the folder to its entries."""
    bound: Callable[[], float] = lambda: float("inf")
    """Function that returns the largest number of bytes; entries that were not used for longest are removed first."""
    days: float = float("inf")
    """Number of days without use after which an entry is removed."""

    def by_use(self, data: Path) -> list[CacheEntry]:
        """Return the entries of a study's cache, those used most recently first. Folders that do not exist hold none."""
        folder = self.folder(data)
        return sorted(self.entries(folder), key=lambda entry: -entry.used) if folder.is_dir() else []

    def superfluous(self, entries: list[CacheEntry], everything: bool = False) -> list[CacheEntry]:
        """Return the entries that are beyond the bound, unused for too long, or unfinished files of a process that died.

        Args:
            entries: The entries, as `by_use` returns them.
            everything: Whether all entries are superfluous.
        """
        if everything:
            return entries
        now, room, found = time.time(), self.bound(), []
        for entry in entries:
            age = now - entry.used
            if age > self.days * DAY or (is_temporary(entry.path.name) and age > UNFINISHED) or entry.bytes > room:
                found.append(entry)
            else:
                room -= entry.bytes
        return found


def activations_folder() -> Path:
    """Return the folder of cached activations, which need not exist."""
    return cache_folder() / "activations"


def activations_bound() -> float:
    """Return the largest number of bytes of cached activations: $OMMATID_CACHE_GB, or else `SHARE` of the disk, at most `MOST`.

    Raises:
        ConfigError: OMMATID_CACHE_GB is not a number of gigabytes.
    """
    text = os.environ.get("OMMATID_CACHE_GB")
    if not text:
        with suppress(OSError):
            total = shutil.disk_usage(nearest_folder(cache_folder())).total
            return min(MOST, SHARE * total) if total else MOST  # some file systems do not say how large they are
        return 0.0
    try:
        gigabytes = float(text)
        if not 0 <= gigabytes < float("inf"):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"OMMATID_CACHE_GB={text}: not a number of gigabytes, 0 or more; 0 turns the cache of activations off, and leaving it out "
            f"allows {SHARE:.0%} of the disk, at most {MOST / 1e9:.0f} GB"
        ) from None
    return gigabytes * 1e9


def activations_to_remove(place: Path) -> str:
    """Return how to make room on the disk of a folder by emptying the cache of activations, in brackets; empty if it is on another disk."""
    with suppress(OSError):
        held = sum(entry.bytes for entry in files_below(activations_folder()))
        if held and activations_folder().stat().st_dev == place.stat().st_dev:
            return f" (`ommatid gc --all activations` frees {in_words(held)})"
    return ""


def _listed(folder: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(folder.iterdir())
    return []


def _images(folder: Path) -> Iterator[CacheEntry]:
    """Yield the database with its journal as one entry, because without the journal it might be damaged."""
    return (entry for entry in children(folder) if entry.path.name == "images")


def _archives(folder: Path) -> Iterator[CacheEntry]:
    return (entry for entry in children(folder) if entry.path.suffix == ".tgz" or entry.path.name.startswith("npm-"))


def _abandoned_drafts(folder: Path) -> Iterator[CacheEntry]:
    """Yield the drafts that no process is working on: those whose lock is free. Drafts in an object store have a subfolder for each."""
    for path in [folder, *(path for path in _listed(folder) if path.is_dir() and not artefact_of(path.name))]:
        for entry in children(path):
            if entry.path.is_dir() and (name := artefact_of(entry.path.name)) and _is_free(path / f"{name}.lock"):
                yield entry


def _measured(folder: Path) -> Iterator[CacheEntry]:
    """Yield the results of a backfill, and drafts of results that no process is working on."""
    for kind in [path for path in _listed(folder) if path.is_dir() and not path.name.startswith(".")]:
        yield from (entry for entry in children(kind) if not entry.path.name.startswith("."))
        yield from _abandoned_drafts(kind / ".work")


def _is_free(lock: Path) -> bool:
    try:
        with filelock.FileLock(lock, timeout=0):
            return True
    except (filelock.Timeout, OSError):
        return False


TEXTS = Cache("texts", "embeddings of words and class names", lambda data: cache_folder() / "texts", bound=lambda: 1e9, days=90)
"""The cache that `store/memo.py` writes."""
CACHES = (
    Cache(
        "activations",
        "activations and embeddings of images, by content",
        lambda data: activations_folder(),
        files_below,
        activations_bound,
    ),
    Cache("checksums", "checksums of the files that params name", lambda data: cache_folder() / "checksums", bound=lambda: 1e9, days=90),
    Cache("code", "what each module does and imports", lambda data: cache_folder() / "code", days=90),
    TEXTS,
    Cache("images", "what runs found in image files", lambda data: cache_folder(), _images, bound=lambda: IMAGES_BYTES, days=90),
    Cache("shards", "where images are in tar archives", lambda data: cache_folder() / "shards", bound=lambda: 2e9, days=90),
    Cache("archives", "data sets fetched from npm", lambda data: cache_folder(), _archives, days=365),
    Cache("copies", "copies of artefacts that lie in an object store", lambda data: CACHE, days=30),
    Cache("backfill", "what was measured of past SAEs", lambda data: data / "backfill", _measured, days=365),
    Cache("drafts", "unfinished artefacts of runs that ended early", lambda data: data / ".work", _abandoned_drafts, days=14),
)
"""All caches. Whoever adds one adds it here, and keeps to its bound while writing."""
