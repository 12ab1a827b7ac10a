"""What earlier runs found in image files, kept in the user's cache folder, so that a file is read and decoded only when it is new.

The cache has two tables. `files` says which content a file had that is unchanged since: its sha256. `seen` says what decoding some content
gave, or why it cannot be decoded. The second does not depend on the source, so an image that was moved, labelled anew, or read by an
experiment in another folder is not decoded again. Deleting the file loses time only.
"""

import hashlib
import json
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from ommatid.images.decode import Unreadable
from ommatid.store.caches import IMAGES_BYTES
from ommatid.store.filesystem import cache_folder

FILE = "images/seen.sqlite"
"""Name of the cache in the cache folder."""
_REMOVED_AT_ONCE = 10_000
_SECONDS = 60.0
"""Time to wait for another process that is writing to the cache."""
_TABLES = """
CREATE TABLE IF NOT EXISTS files (token BLOB PRIMARY KEY, content BLOB NOT NULL, used INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seen (key BLOB PRIMARY KEY, value BLOB NOT NULL, sum INTEGER NOT NULL, used INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS files_used ON files (used);
CREATE INDEX IF NOT EXISTS seen_used ON seen (used);
"""
_ADD_FILE = "INSERT OR REPLACE INTO files VALUES (?, ?, ?)"
_ADD_SEEN = "INSERT OR REPLACE INTO seen VALUES (?, ?, ?, ?)"


@dataclass(frozen=True)
class Seen:
    """What an image's content alone determines, as columns of the table `images`."""

    width: int
    height: int
    thumbnail: bytes
    remarks: tuple[str, ...] = ()
    """Keys of `examine.REMARKS` that apply to the image; not a column of the table."""


class Memory:
    """The cache, open. It may be used from several threads, and several processes may have it open.

    If it is damaged or cannot be written, everything is forgotten, and the run goes on without it.

    Args:
        settings: Text that identifies everything besides an image's content that determines what is found in it: params and code.
        on_problem: Called with a sentence if the cache cannot be used.
    """

    def __init__(self, settings: str, on_problem: Callable[[str], None] = lambda line: None):
        self._settings = settings
        self._on_problem = on_problem
        self._lock = threading.Lock()
        self._day = int(time.time() // 86400)
        self._waiting: dict[str, list[tuple[Any, ...]]] = {}
        """Rows to be written, by the statement that writes them."""
        self._path = cache_folder() / FILE
        self._database = self._open()

    def __enter__(self) -> "Memory":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        with self._lock:
            self._try(_trim)
            if self._database:
                self._database.close()

    def content_of(self, token: str) -> str | None:
        """Return the sha256 of the file that a token identifies (see `Item.token`), if it was read before."""
        found = self._find("files", "content", hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()) if token else None
        return found[0].hex() if found else None

    def find(self, image_id: str) -> Seen | Unreadable | None:
        """Return what was found in the content with this sha256, or None if it was never seen or its entry is damaged."""
        found = self._find("seen", "value, sum", key := self._key(image_id))
        return _parse(found[0]) if found and zlib.crc32(key + found[0]) == found[1] else None

    def add(self, token: str, image_id: str, found: Seen | Unreadable | None = None) -> None:
        """Remember the content of a file, and what was found in it unless that is remembered already; `flush` writes both."""
        with self._lock:
            if token:
                digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
                self._waiting.setdefault(_ADD_FILE, []).append((digest, bytes.fromhex(image_id), self._day))
            if found:
                key, value = self._key(image_id), _dump(found)
                self._waiting.setdefault(_ADD_SEEN, []).append((key, value, zlib.crc32(key + value), self._day))

    def flush(self) -> None:
        """Write what waits, in one transaction."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
            self._try(lambda database: [database.executemany(*statement) for statement in waiting.items()])

    def _open(self) -> sqlite3.Connection | None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(self._path, timeout=_SECONDS, check_same_thread=False)
            try:
                database.execute("PRAGMA auto_vacuum = FULL")  # takes effect when the file is made
                database.executescript(_TABLES)
            except sqlite3.Error:
                database.close()
                raise
            return database
        except (OSError, sqlite3.Error) as error:
            self._report(error)
            return None

    def _find(self, table: str, columns: str, key: bytes) -> tuple[Any, ...] | None:
        name = "token" if table == "files" else "key"
        with self._lock:
            found = self._try(lambda it: it.execute(f"SELECT {columns}, used FROM {table} WHERE {name} = ?", (key,)).fetchone())
            if found and found[-1] != self._day:
                self._waiting.setdefault(f"UPDATE {table} SET used = ? WHERE {name} = ?", []).append((self._day, key))
        return found

    def _try(self, run: Callable[[sqlite3.Connection], Any]) -> Any:
        """Run statements in a transaction; return None if the cache cannot be used."""
        if self._database is None:
            return None
        try:
            with self._database:
                return run(self._database)
        except (OSError, sqlite3.Error) as error:
            self._database.close()
            self._database = None
            self._report(error)
            return None

    def _report(self, error: Exception) -> None:
        self._on_problem(
            f"{self._path}: what earlier runs found in the images cannot be used ({error}), so all are decoded; delete it, or "
            "let OMMATID_CACHE name a folder that can be written"
        )

    def _key(self, image_id: str) -> bytes:
        return hashlib.sha256(f"{self._settings}\0{image_id}".encode()).digest()


def forget(image_id: str) -> None:
    """Forget which files have the content with this sha256, so that the next run reads them, if there is a cache that can be written."""
    path = cache_folder() / FILE
    with suppress(OSError, sqlite3.Error):
        if path.exists():
            with closing(sqlite3.connect(path, timeout=_SECONDS)) as database, database:
                database.execute("DELETE FROM files WHERE content = ?", (bytes.fromhex(image_id),))


def _trim(database: sqlite3.Connection) -> None:
    """Remove the entries unused for longest until the cache is within its bound."""
    while _size(database) > IMAGES_BYTES:
        removed = 0
        for table, key in (("seen", "key"), ("files", "token")):
            oldest = f"SELECT {key} FROM {table} ORDER BY used LIMIT {_REMOVED_AT_ONCE}"
            removed += database.execute(f"DELETE FROM {table} WHERE {key} IN ({oldest})").rowcount
        if not removed:
            return


def _size(database: sqlite3.Connection) -> int:
    """Return the bytes of all pages that hold entries."""
    pages, unused, size = (database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size"))
    return (pages - unused) * size


def _dump(found: Seen | Unreadable) -> bytes:
    if isinstance(found, Unreadable):
        return json.dumps([found.reason, found.detail]).encode()
    return json.dumps([found.width, found.height, found.remarks]).encode() + b"\n" + found.thumbnail


def _parse(value: bytes) -> Seen | Unreadable:
    head, _, thumbnail = value.partition(b"\n")
    if len(values := json.loads(head)) == 2:
        return Unreadable(*values)
    width, height, remarks = values
    return Seen(width, height, thumbnail, tuple(remarks))
