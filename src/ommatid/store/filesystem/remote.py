"""Folders behind URLs such as s3://bucket/prefix. Only this file imports fsspec, and only when the first URL is opened.

Object stores show an object only once all of it has arrived, so that files need no temporary names.
"""

import errno
import functools
import http.client
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from ommatid.errors import ArtefactError
from ommatid.store.filesystem.base import Entry, Folder, Ranges

OBJECTS_AT_ONCE = 1000
"""Number of objects read, copied or removed in one call, which sends the requests concurrently."""
COPIES_AT_ONCE = 32
"""Number of concurrent requests to copy an object. The store does the copying while this machine waits."""
ANSWER_SECONDS = 10.0
"""Seconds that a store may take to answer the first request."""


class Remote(Folder):
    """A prefix of an object store, or anything else that fsspec reaches by URL. The library for it supplies credentials and endpoint."""

    def __init__(self, url: str):
        self.url = url
        self._fs, self._root = _filesystem(url)

    @property
    def parent(self) -> "Remote":
        """The prefix that holds this one."""
        return Remote(self.url.rpartition("/")[0])

    def __truediv__(self, name: str) -> "Remote":
        return Remote(f"{self.url}/{name}")

    def local_path(self, name: str = "") -> None:
        """Return None, because objects have no path."""

    def free_bytes(self) -> None:
        """Return None, because object stores do not report free space."""

    def exists(self) -> bool:
        """Return whether any object has this prefix, after checking that the bucket exists."""
        with self._guard():
            if self._list(self._root):
                return True
            try:
                self._fs.ls(self._root.partition("/")[0])
            except PermissionError:
                return False  # The credentials may be limited to the prefix.
            except FileNotFoundError:
                raise ArtefactError(f"{self.url}: there is no such bucket; make it, or correct the URL") from None
            return False

    def make(self, mark: str = "") -> None:
        """Put an empty object named `mark`. Without `mark`, do nothing, because object stores have no folders."""
        if mark:
            with tempfile.TemporaryDirectory(prefix="ommatid-") as scratch:
                path = Path(scratch) / mark
                path.touch()
                self.put(path, mark)

    def is_made(self, mark: str) -> bool:
        """Return whether the object named `mark` exists."""
        return self.size(mark) is not None

    def sizes(self, inside: str = "") -> dict[str, int]:
        """Return the size of every object, by name; an empty dict if there are none."""
        with self._guard(inside):
            return {_last(found["name"]): found["size"] for found in self._list(self._path(inside)) if found["type"] == "file"}

    def folders(self) -> list[str]:
        """Return the names of the prefixes below this one, in order."""
        with self._guard():
            return sorted(_last(found["name"]) for found in self._list(self._root) if found["type"] == "directory")

    def entries(self) -> Iterator[Entry]:
        """Yield all objects below the prefix, in any order."""
        with self._guard():
            found = self._fs.find(self._root, detail=True)
        for path, info in found.items():
            yield _entry(path.removeprefix(self._root).lstrip("/"), info)

    def iter_visible(self) -> Iterator[Entry]:
        """Yield the objects below the prefix, in any order, except hidden ones, whose name has a part that begins with a dot."""
        return (entry for entry in self.entries() if not any(part.startswith(".") for part in entry.name.split("/")))

    def entry(self, name: str = "") -> Entry | None:
        """Return the entry of an object, or None if it is missing or a prefix."""
        with self._guard(name):
            try:
                info = self._fs.info(self._path(name))
            except FileNotFoundError:
                return None
            return _entry(name, info) if info["type"] == "file" else None

    def open(self, name: str, size: int | None = None) -> BinaryIO:
        """Open an object for reading from any position. Every read is a request, so large reads are faster."""
        return cast(BinaryIO, _Object(self, name, self._needed_size(name) if size is None else size))

    def read_bytes(self, name: str) -> bytes:
        """Read a whole object."""
        return self._read(name, None, None)

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Read the bytes of an object, which must not be empty, from `start` up to `end` or the end of the object."""
        return self._read(name, start, end)

    def _read(self, name: str, start: int | None, end: int | None) -> bytes:
        with self._guard(name):
            try:
                return self._fs.cat_file(self._path(name), start=start, end=end)
            except FileNotFoundError:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.url}/{name}") from None

    def iter_bytes(self, names: Sequence[str]) -> Iterator[bytes]:
        """Yield the contents of many small objects, in order. Many are requested at a time."""
        for start in range(0, len(names), OBJECTS_AT_ONCE):
            paths = [self._path(name) for name in names[start : start + OBJECTS_AT_ONCE]]
            with self._guard():
                found = self._fs.cat(paths, recursive=False)
            yield from (found[path] for path in paths)

    def put(self, path: Path, name: str) -> None:
        """Upload a file and remove the local copy."""
        with self._guard(name):
            try:
                self._fs.put_file(str(path), self._path(name))
            except FileNotFoundError:
                raise ArtefactError(f"{self.url}: there is no such bucket; make it, or correct the URL") from None
        path.unlink()

    @contextmanager
    def mirror(self, bring: Iterable[str] = (), replace: str = "") -> Iterator[Path]:
        """Yield a temporary folder whose files are uploaded when the block ends, even if it ends with an error."""
        with tempfile.TemporaryDirectory(prefix="ommatid-") as scratch:
            path = Path(scratch)
            if wanted := set(bring):
                for name in self.sizes().keys() & wanted:
                    self.fetch(name, path / name)
            try:
                yield path
            finally:
                new = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
                old = {f"{replace}/{name}" for name in self.sizes(replace)} if replace and (path / replace).exists() else set()
                for name in old.difference(new):
                    self.remove(name)
                for name in new:
                    self.put(path / name, name)

    def share(self, name: str, to: str) -> None:
        """Copy the object within the store."""
        with self._guard(to):
            self._copy([(self._path(name), self._path(to), self._needed_size(name))])

    def remove(self, name: str) -> None:
        """Remove an object, or everything below a prefix."""
        with self._guard(name):
            for group in _groups(list(self._fs.find(self._path(name)))):
                self._fs.rm(group)

    def move(self, place: Folder, last: str) -> None:
        """Copy all objects within the store, then remove the originals. An interrupted move is completed by moving again.

        `last` is removed from `place` first and copied there last, so that readers find the old folder, no folder or the new one, but never
        a mixture.
        """
        assert isinstance(place, Remote), place
        sizes = {entry.name: entry.bytes for entry in self.entries()}
        names = sorted(sizes, key=lambda name: (_last(name) == last, name == last, name))
        with self._guard():
            place.remove(last)
            for group in _groups(sorted({entry.name for entry in place.entries()} - sizes.keys())):
                self._fs.rm([place._path(name) for name in group])
            n_parts = sum(_last(name) != last for name in names)
            for group in (*_groups(names[:n_parts]), *([name] for name in names[n_parts:])):
                try:
                    self._copy([(self._path(name), place._path(name), sizes[name]) for name in group])
                except FileNotFoundError:
                    raise ArtefactError(
                        f"{self.url}: another machine removed files while they were being published; run the stage again"
                    ) from None
            self.remove(last)
            self.remove("")

    def _guard(self, name: str = "") -> AbstractContextManager[None]:
        """Turn the errors of a store that cannot be reached or refuses a request into an `ArtefactError` that says what to do."""
        return _guarding(f"{self.url}/{name}" if name else self.url)

    def _copy(self, objects: Sequence[tuple[str, str, int]]) -> None:
        """Copy objects within the store, each of which is given by its path, its new path and its size in bytes."""
        if "s3" in self._fs.protocol:
            # One request per object: from 150 MB on, s3fs would copy in sequential parts, which not every store supports.
            with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
                list(pool.map(lambda found: _copy_on_s3(self._fs, *found), objects))
        else:
            self._fs.copy([source for source, _, _ in objects], [target for _, target, _ in objects])

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _list(self, path: str) -> list[dict[str, Any]]:
        try:
            return [found for found in self._fs.ls(path, detail=True) if found["name"].rstrip("/") != path]
        except FileNotFoundError:
            return []

    def _needed_size(self, name: str) -> int:
        size = self.size(name)
        if size is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.url}/{name}")
        return size


class _Object(Ranges):
    """An object, opened as a file."""

    def __init__(self, folder: Remote, name: str, size: int):
        super().__init__(size)
        self._folder, self._name = folder, name

    def _read_range(self, start: int, end: int) -> bytes:
        return self._folder.read_range(self._name, start, end)


@functools.cache
def _filesystem(url: str) -> tuple[Any, str]:
    """Return a store's fsspec file system, and the path in it. Listings are not cached, because other processes write too."""
    import fsspec

    if set(url) & set("*?["):
        raise ArtefactError(f"{url}: must not contain any of * ? [; choose another name")
    try:
        fs, root = fsspec.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        protocol = url.partition("://")[0]
        what = "pip install 'ommatid[s3]'" if protocol in ("s3", "s3a") else str(error)
        raise ArtefactError(f"{url}: the library for {protocol}:// is not installed here: {what}") from None
    except ValueError as error:
        raise ArtefactError(f"{url}: not a usable URL ({error}); use a path, or s3://bucket/prefix") from None
    with _guarding(url):
        if endpoint := _endpoint_of(fs, url):
            _check_answers(endpoint)
    return fs, root.rstrip("/")


def _endpoint_of(fs: Any, url: str) -> str | None:
    """Return the address of the server that receives the requests, or None if there is no known way to find it."""
    if "s3" in fs.protocol:
        fs.connect()
        return fs.s3.meta.endpoint_url
    return "/".join(url.split("/")[:3]) if url.startswith(("http://", "https://")) else None


@functools.cache
def _check_answers(endpoint: str) -> None:
    """Check within seconds that a server answers at all. The libraries would retry for minutes, even if no such server exists.

    Raises:
        ConnectionError: The server does not answer.
    """
    import ssl
    import urllib.error
    import urllib.request

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:
            return None  # A redirect is an answer too, and is not followed.

    # The certificate is not checked here, because nothing secret is sent. The library that sends credentials checks it.
    https = urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
    try:
        urllib.request.build_opener(Stay, https).open(urllib.request.Request(endpoint, method="HEAD"), timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError as answer:
        answer.close()
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"{endpoint}: {getattr(error, 'reason', error)}") from error


_FULL = (errno.ENOSPC, errno.EDQUOT)
_BACKENDS = ("botocore", "aiobotocore", "aiohttp", "fsspec", "s3fs", "gcsfs", "adlfs", "requests", "urllib3")


@contextmanager
def _guarding(where: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ArtefactError):
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise ArtefactError(_refused(where, error)) from error
    except Exception as error:  # Every backend has its own exceptions, which fsspec passes on.
        if not type(error).__module__.startswith(_BACKENDS):
            raise
        raise ArtefactError(_refused(where, error)) from error


def _refused(where: str, error: Exception) -> str:
    said = str(error).strip() or type(error).__name__
    if where.startswith(("s3://", "s3a://")):
        todo = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL for a store that is not Amazon's"
    else:
        todo = "check its server and credentials"
    return f"{where}: the store does not answer as it should ({said}); {todo}, then run the stage again: what is finished is kept"


_S3_COPIES = 5 * 2**30
"""Largest object, in bytes, that S3 copies in one request."""


def _copy_on_s3(fs: Any, source: str, target: str, size: int) -> None:
    if size > _S3_COPIES:
        fs.cp_file(source, target)
        return
    (from_bucket, from_key, _), (bucket, key, _) = fs.split_path(source), fs.split_path(target)
    fs.call_s3("copy_object", Bucket=bucket, Key=key, CopySource={"Bucket": from_bucket, "Key": from_key})


def _entry(name: str, info: dict[str, Any]) -> Entry:
    stamp = next((info[key] for key in ("ETag", "etag", "LastModified", "mtime", "created") if info.get(key)), "")
    return Entry(name, info["size"], str(stamp).strip('"'))  # some stores quote an ETag in one answer and not in another


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _groups(names: list[str]) -> list[list[str]]:
    return [names[start : start + OBJECTS_AT_ONCE] for start in range(0, len(names), OBJECTS_AT_ONCE)]
