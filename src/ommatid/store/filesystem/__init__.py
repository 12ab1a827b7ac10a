"""Folders that hold artefacts and images: on this machine's disk, or behind a URL such as s3://bucket/prefix.

Only this file knows fsspec, and loads it when the first URL is opened. A file appears in a folder whole or not at all: on a disk it is
written aside, synced and renamed; an object store shows an object when all of it has arrived.
"""

import errno
import functools
import hashlib
import http.client
import io
import os
import secrets
import shutil
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from ommatid.errors import ArtefactError, Lack, describe, find_lack, without_credentials

OBJECTS_AT_ONCE = 1000
"""Objects asked for, copied or removed in one go: their requests run side by side."""
COPIES_AT_ONCE = 32
"""Requests to copy an object that run side by side: the store works, and this machine waits."""
KNOCK_SECONDS = 10.0
"""How long a store may take to answer for the first time."""
READ_BYTES = 8 * 2**20
"""Bytes of an object asked for at once while it is read from end to end: few enough to hold, enough to hide the way there."""


@dataclass(frozen=True)
class Entry:
    """A file below a folder."""

    name: str
    """Path below the folder, with slashes."""
    bytes: int
    """Size."""
    stamp: str
    """Changes when the content does: a checksum that the store keeps, or else the time of the last change."""


class Folder(ABC):
    """A folder of files. Names are relative to it and may lead into folders inside, with slashes."""

    url: str
    """A path or URL that `open_folder` takes, also in another process."""

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    @abstractmethod
    def parent(self) -> "Folder":
        """The folder that holds this one."""

    @abstractmethod
    def __truediv__(self, name: str) -> "Folder": ...

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is anything.

        Raises:
            ArtefactError: the place as a whole (server, bucket) cannot be reached.
        """

    @abstractmethod
    def sizes(self, inside: str = "") -> dict[str, int]:
        """Size of every file in the folder or in one inside it, by name; nothing where it does not exist. One listing."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Names of the folders inside, in order."""

    @abstractmethod
    def entry(self, name: str = "") -> Entry | None:
        """A file, or this itself if it is one; None: there is none, or it is a folder."""

    def size(self, name: str) -> int | None:
        """Size of a file; None: there is none."""
        entry = self.entry(name)
        return entry.bytes if entry else None

    @abstractmethod
    def open(self, name: str, size: int | None = None) -> BinaryIO:
        """A file to read from anywhere; a `size` that is known spares looking it up. Raises FileNotFoundError."""

    @abstractmethod
    def read_bytes(self, name: str) -> bytes:
        """A file's content. Raises FileNotFoundError."""

    @abstractmethod
    def iter_bytes(self, names: Sequence[str]) -> Iterator[bytes]:
        """Content of many small files, in order. Raises FileNotFoundError."""

    @abstractmethod
    def put(self, path: Path, name: str) -> None:
        """Make a finished file on this machine a file of the folder, whole or not at all; `path` is gone afterwards."""

    @abstractmethod
    def share(self, name: str, to: str) -> None:
        """Give a file a second name, without a second transfer."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file or a folder with all that is in it; nothing happens where there is none."""

    @abstractmethod
    def move(self, place: "Folder", last: str) -> None:
        """Become `place`, a folder of the same kind, replacing what is there.

        Args:
            place: Where it goes.
            last: Name of the file without which a folder counts as unfinished, here and in folders inside.
        """

    def sha256(self, name: str, size: int | None = None) -> str:
        """Checksum of a file."""
        digest = hashlib.sha256()
        with self.open(name, size) as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def fetch(self, name: str, to: Path, sha256: str | None = None) -> None:
        """Copy a file to this machine, whole or not at all.

        Raises:
            ArtefactError: what came is not what `sha256` says.
        """
        aside = aside_of(to)
        with writing(to):
            to.parent.mkdir(parents=True, exist_ok=True)
            try:
                with self.open(name) as source, aside.open("wb") as target:
                    digest = hashlib.sha256()
                    while block := source.read(READ_BYTES):
                        digest.update(block)
                        target.write(block)
                if sha256 not in (None, digest.hexdigest()):
                    raise ArtefactError(f"{self.url}/{name}: checksum differs from the manifest's; make it again")
                os.replace(aside, to)
            finally:
                aside.unlink(missing_ok=True)


def open_folder(place: "Folder | Path | str") -> Folder:
    """The folder at a path or URL; it need not exist.

    Raises:
        ArtefactError: a URL of a kind that is not known here, or whose library is not installed.
    """
    if isinstance(place, Folder):
        return place
    text = str(place)
    if isinstance(place, str) and "://" in text:
        if (bare := without_credentials(text)) != text:
            raise ArtefactError(
                f"{bare}: was given with a user name, a password or a query, which would be written wherever it is named; take it out"
            )
        protocol, _, rest = text.partition("://")
        return Disk(Path(rest)) if protocol == "file" else Remote(text.rstrip("/"))
    return Disk(Path(place))


def cache_folder() -> Path:
    """Where this user's machine keeps what can be made or fetched again: $OMMATID_CACHE, else ~/.cache/ommatid; need not exist."""
    return Path(os.environ.get("OMMATID_CACHE") or Path.home() / ".cache" / "ommatid")


def aside_of(path: Path) -> Path:
    """Where a file is written before it gets its name: unlike that of any other writer, in this process or another."""
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def is_aside(name: str) -> bool:
    """Whether a file is one that a writer has not finished; safetensors, too, writes aside, as `.tmp` and six letters."""
    return name.endswith(".tmp") or name.startswith(".tmp")


def in_words(n_bytes: float) -> str:
    """A size to read, such as `20 kB`, `3.5 MB` or `2.0 GB`."""
    if n_bytes < 1e6:
        return f"{n_bytes / 1e3:.0f} kB"
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:.1f} GB"


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Disk(Folder):
    """A directory on this machine, or one that its file system shows."""

    def __init__(self, path: Path):
        self.path = path
        self.url = str(path)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.name

    @property
    def parent(self) -> "Disk":
        """The directory that holds this one."""
        return Disk(self.path.parent)

    def __truediv__(self, name: str) -> "Disk":
        return Disk(self.path / name)

    def exists(self) -> bool:
        """Whether there is such a directory."""
        return self.path.exists()

    def sizes(self, inside: str = "") -> dict[str, int]:
        """Size of every finished file by name."""
        try:
            with os.scandir(self.path / inside) as found:
                return {entry.name: entry.stat().st_size for entry in found if not is_aside(entry.name) and entry.is_file()}
        except FileNotFoundError:
            return {}

    def folders(self) -> list[str]:
        """Names of the directories inside, in order."""
        try:
            with os.scandir(self.path) as found:
                return sorted(entry.name for entry in found if entry.is_dir())
        except FileNotFoundError:
            return []

    def entry(self, name: str = "") -> Entry | None:
        """A file; None: there is none, or it is a directory."""
        try:
            status = (self.path / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Entry(name, status.st_size, str(status.st_mtime_ns)) if stat.S_ISREG(status.st_mode) else None

    def open(self, name: str, size: int | None = None) -> BinaryIO:
        """A file to read from anywhere."""
        return (self.path / name).open("rb")

    def read_bytes(self, name: str) -> bytes:
        """A file's content."""
        return (self.path / name).read_bytes()

    def iter_bytes(self, names: Sequence[str]) -> Iterator[bytes]:
        """Content of many small files, in order."""
        return (self.read_bytes(name) for name in names)

    def put(self, path: Path, name: str) -> None:
        """Sync and rename; `path` is on the same file system."""
        sync(path)
        os.replace(path, self.path / name)

    def share(self, name: str, to: str) -> None:
        """A hard link, or a copy where the file system has none."""
        aside = aside_of(self.path / to)
        (self.path / to).parent.mkdir(exist_ok=True)
        try:
            os.link(self.path / name, aside)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV):
                raise
            shutil.copyfile(self.path / name, aside)
            sync(aside)
        os.replace(aside, self.path / to)
        aside.unlink(missing_ok=True)  # rename does nothing where both are links to one file already

    def remove(self, name: str) -> None:
        """Remove a file or a directory with all that is in it."""
        path = self.path / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def move(self, place: Folder, last: str) -> None:
        """Two renames: readers find the old one, for a moment none, then the new one."""
        assert isinstance(place, Disk), place
        for folder in (self.path, *(self.path / name for name in self.folders())):
            sync(folder)
        old = self.path.with_name(self.path.name + ".old")
        if old.exists():
            shutil.rmtree(old)
        if place.path.exists():
            os.rename(place.path, old)
        os.rename(self.path, place.path)
        sync(place.path.parent)
        if old.exists():
            shutil.rmtree(old)


class Remote(Folder):
    """A prefix of an object store, or whatever else fsspec reaches by a URL. Credentials and endpoint are those of its library."""

    def __init__(self, url: str):
        self.url = url
        self._fs, self._root = _filesystem(url)

    @property
    def parent(self) -> "Remote":
        """The prefix that holds this one."""
        return Remote(self.url.rpartition("/")[0])

    def __truediv__(self, name: str) -> "Remote":
        return Remote(f"{self.url}/{name}")

    def exists(self) -> bool:
        """Whether there is any object; finds out too whether there is such a bucket."""
        with self._guard():
            if self._list(self._root):
                return True
            try:
                self._fs.ls(self._root.partition("/")[0])
            except PermissionError:
                return False  # may see its own prefix only
            except FileNotFoundError:
                raise ArtefactError(f"{self.url}: there is no such bucket; make it, or mend the URL") from None
            return False

    def sizes(self, inside: str = "") -> dict[str, int]:
        """Size of every object by name."""
        with self._guard(inside):
            return {_last(found["name"]): found["size"] for found in self._list(self._path(inside)) if found["type"] == "file"}

    def folders(self) -> list[str]:
        """Names of the prefixes inside, in order."""
        with self._guard():
            return sorted(_last(found["name"]) for found in self._list(self._root) if found["type"] == "directory")

    def entries(self) -> Iterator[Entry]:
        """All objects below, in any order."""
        with self._guard():
            found = self._fs.find(self._root, detail=True)
        for path, info in found.items():
            yield _entry(path.removeprefix(self._root).lstrip("/"), info)

    def entry(self, name: str = "") -> Entry | None:
        """An object; None: there is none, or it is a prefix."""
        with self._guard(name):
            try:
                info = self._fs.info(self._path(name))
            except FileNotFoundError:
                return None
            return _entry(name, info) if info["type"] == "file" else None

    def open(self, name: str, size: int | None = None) -> BinaryIO:
        """An object to read from anywhere; every read is a request, so ask for much at once."""
        return cast(BinaryIO, _Object(self, name, self._needed_size(name) if size is None else size))

    def read_bytes(self, name: str) -> bytes:
        """An object's content."""
        return self.read_range(name, None, None)

    def read_range(self, name: str, start: int | None, end: int | None) -> bytes:
        """Bytes of an object from `start` up to `end`; None: from its begin, to its end."""
        with self._guard(name):
            try:
                return self._fs.cat_file(self._path(name), start=start, end=end)
            except FileNotFoundError:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.url}/{name}") from None

    def iter_bytes(self, names: Sequence[str]) -> Iterator[bytes]:
        """Content of many small objects, in order, many at a time."""
        for start in range(0, len(names), OBJECTS_AT_ONCE):
            paths = [self._path(name) for name in names[start : start + OBJECTS_AT_ONCE]]
            with self._guard():
                found = self._fs.cat(paths, recursive=False)
            yield from (found[path] for path in paths)

    def put(self, path: Path, name: str) -> None:
        """Upload; the object is there when all of it has arrived."""
        with self._guard(name):
            try:
                self._fs.put_file(str(path), self._path(name))
            except FileNotFoundError:
                raise ArtefactError(f"{self.url}: there is no such bucket; make it, or mend the URL") from None
        path.unlink()

    def share(self, name: str, to: str) -> None:
        """A copy that the store makes by itself."""
        with self._guard(to):
            self._copy([(self._path(name), self._path(to), self._needed_size(name))])

    def remove(self, name: str) -> None:
        """Remove an object, or all below a prefix."""
        with self._guard(name):
            for group in _groups(list(self._fs.find(self._path(name)))):
                self._fs.rm(group)

    def move(self, place: Folder, last: str) -> None:
        """Copied by the store, then removed: whatever moment this ends at, doing it again ends it.

        `last` goes first from `place` and comes last to it: readers find the old one whole, none, or the new one whole.
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
                        f"{self.url}: another machine took files away while they were published; run the stage again"
                    ) from None
            self.remove(last)
            self.remove("")

    def _guard(self, name: str = "") -> AbstractContextManager[None]:
        """Turn a store that cannot be reached, or refuses, into an error that says what to do."""
        return _guarding(f"{self.url}/{name}" if name else self.url)

    def _copy(self, objects: Sequence[tuple[str, str, int]]) -> None:
        """Let the store copy objects: path, new path, bytes."""
        if "s3" in self._fs.protocol:
            # in one request each: s3fs copies piece by piece from 150 MB on, one piece after the other, which not every store can
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


class Ranges(io.RawIOBase):
    """A file of known size that can be read from anywhere; a subclass says how a range of its bytes is read."""

    def __init__(self, size: int):
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go somewhere."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> Any:
        """The next bytes, as anything that has the buffer protocol."""
        start = self._at
        end = self._size if size is None or size < 0 else min(start + size, self._size)
        if end <= start:
            return b""
        self._at = end
        return self._read_range(start, end)

    def readall(self) -> Any:
        """All that is left."""
        return self.read()

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer."""
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def _read_range(self, start: int, end: int) -> Any:
        raise NotImplementedError


class _Object(Ranges):
    """An object as a file."""

    def __init__(self, folder: Remote, name: str, size: int):
        super().__init__(size)
        self._folder, self._name = folder, name

    def _read_range(self, start: int, end: int) -> bytes:
        return self._folder.read_range(self._name, start, end)


@functools.cache
def _filesystem(url: str) -> tuple[Any, str]:
    """Fsspec's hold on a store, and the path of the folder in it. Listings are never remembered: other processes write, too."""
    import fsspec

    if set(url) & set("*?["):
        raise ArtefactError(f"{url}: may not have any of * ? [ in it; choose another name")
    try:
        fs, root = fsspec.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        protocol = url.partition("://")[0]
        what = "pip install 'ommatid[s3]'" if protocol in ("s3", "s3a") else str(error)
        raise ArtefactError(f"{url}: the library for {protocol}:// is not installed here: {what}") from None
    except ValueError as error:
        raise ArtefactError(f"{url}: not a URL that can be used ({error}); use a path, or s3://bucket/prefix") from None
    with _guarding(url):
        if endpoint := _endpoint_of(fs, url):
            _knock(endpoint)
    return fs, root.rstrip("/")


def _endpoint_of(fs: Any, url: str) -> str | None:
    """Address of the server that requests go to, where it is known how to find it."""
    if "s3" in fs.protocol:
        fs.connect()
        return fs.s3.meta.endpoint_url
    return "/".join(url.split("/")[:3]) if url.startswith(("http://", "https://")) else None


@functools.cache
def _knock(endpoint: str) -> None:
    """Find out in seconds whether anything answers at all; the libraries try for minutes, which is right only once a store was there.

    Raises:
        ConnectionError: nothing does.
    """
    import ssl
    import urllib.error
    import urllib.request

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:
            return None  # an answer is an answer; nobody else is asked

    # nothing secret is sent: certificates are checked by the library that sends it, which knows the user's bundle
    https = urllib.request.HTTPSHandler(context=ssl._create_unverified_context())
    try:
        urllib.request.build_opener(Stay, https).open(urllib.request.Request(endpoint, method="HEAD"), timeout=KNOCK_SECONDS).close()
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
    except Exception as error:  # every backend has errors of its own, which fsspec lets through
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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a disk lacks or refuses, whatever library met it, into an error that says what to do."""
    try:
        yield
    except Exception as error:
        lack = find_lack(error)
        if lack not in _OF_DISKS:
            raise
        raise ArtefactError(f"{path}: {_explain(lack, error, path)} and run the stage again: what is finished is kept") from error


def _explain(lack: Lack, error: Exception, path: Path) -> str:
    what, todo = lack.value
    if lack in (Lack.SPACE, Lack.QUOTA):
        return f"{what} ({in_words(shutil.disk_usage(_existing(path)).free)} free); {todo}"
    if lack in (Lack.READ_ONLY, Lack.DENIED):
        return f"cannot be written ({what}); make {_existing(path)} writable for this user"
    return f"{what} ({describe(error)}); {todo}"


_OF_DISKS = (Lack.SPACE, Lack.QUOTA, Lack.FILE_SIZE, Lack.READ_ONLY, Lack.DENIED, Lack.FILES, Lack.DISK)


def _existing(path: Path) -> Path:
    """The nearest folder that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


_S3_COPIES = 5 * 2**30
"""Bytes of the largest object that S3 copies in one request."""


def _copy_on_s3(fs: Any, source: str, target: str, size: int) -> None:
    if size > _S3_COPIES:
        fs.cp_file(source, target)
        return
    (from_bucket, from_key, _), (bucket, key, _) = fs.split_path(source), fs.split_path(target)
    fs.call_s3("copy_object", Bucket=bucket, Key=key, CopySource={"Bucket": from_bucket, "Key": from_key})


def _entry(name: str, info: dict[str, Any]) -> Entry:
    stamp = next((info[key] for key in ("ETag", "etag", "LastModified", "mtime", "created") if info.get(key)), "")
    return Entry(name, info["size"], str(stamp))


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _groups(names: list[str]) -> list[list[str]]:
    return [names[start : start + OBJECTS_AT_ONCE] for start in range(0, len(names), OBJECTS_AT_ONCE)]
