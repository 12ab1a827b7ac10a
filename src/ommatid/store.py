"""Artefacts: directories of Parquet parts and a manifest, written aside as drafts and renamed into place whole."""

import errno
import functools
import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa
import pyarrow.parquet as pq

from ommatid.errors import ArtefactError
from ommatid.schemas import SCHEMA_VERSION

MANIFEST = "manifest.json"
SCRATCH = "scratch"
"""Folder of a draft, on this machine only, whose files (chunks, checkpoints) never become part of the artefact."""
RECEIPTS = "receipts"
"""Folder of a draft, where its finished files are, for what workers tell the driver; never part of the artefact."""


@dataclass(frozen=True, slots=True)
class File:
    """One file of an artefact, as its manifest lists it."""

    name: str
    """File name inside the artefact; `<child>/manifest.json` stands for all of a child."""
    bytes: int
    """Size."""
    sha256: str
    """Checksum of the content."""
    rows: int | None
    """Rows, where it is Parquet."""


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says of an artefact."""

    kind: str
    """images, extraction, activations, sae, evaluation, labels or catalog."""
    schema_version: int
    """`schemas.SCHEMA_VERSION` of the writer."""
    params: dict[str, Any]
    """The section of Params that made it, without what only says how to compute."""
    inputs: dict[str, str]
    """sha256 of the manifest of each input artefact."""
    files: tuple[File, ...]
    """All files, by name."""
    versions: dict[str, str]
    """Of code and libraries."""
    summary: dict[str, Any]
    """Statistics that the quality gate and later stages read."""

    def to_json(self) -> bytes:
        """The text of manifest.json: a line a file, for there may be millions."""
        values = {name: getattr(self, name) for name in ("kind", "schema_version", "params", "inputs", "versions", "summary")}
        head = json.dumps(values, indent=2, sort_keys=True).removesuffix("\n}")
        lines = (json.dumps({"bytes": f.bytes, "name": f.name, "rows": f.rows, "sha256": f.sha256}) for f in self.files)
        return (head + ',\n  "files": [\n    ' + ",\n    ".join(lines) + "\n  ]\n}\n").encode()

    @classmethod
    def from_json(cls, text: bytes) -> "Manifest":
        """Read the text of manifest.json.

        Raises:
            ValueError, KeyError, TypeError: it is not one.
            ArtefactError: it is of another schema version.
        """
        values = json.loads(text, object_hook=lambda found: File(**found) if found.keys() == _FILE_KEYS else found)
        version = values["schema_version"]
        if version != SCHEMA_VERSION:
            raise ArtefactError(
                f"written with schema version {version}, this code reads {SCHEMA_VERSION}; "
                "run the stage again, or use the version of ommatid that wrote it"
            )
        files = tuple(values.pop("files"))
        if not all(isinstance(file, File) for file in files):
            raise ValueError("a file without name, bytes, sha256 or rows")
        return cls(files=files, **values)


_FILE_KEYS = frozenset(("name", "bytes", "sha256", "rows"))


class Artefact:
    """A finished artefact, opened read-only."""

    def __init__(self, path: Path, manifest: Manifest, digest: str):
        self.path = path
        self.manifest = manifest
        self.digest = digest
        """sha256 of manifest.json: stands for the whole content."""

    @property
    def url(self) -> str:
        """Where it is, in words that `open_artefact` takes."""
        return str(self.path)

    @property
    def summary(self) -> dict[str, Any]:
        """Statistics that the stage wrote into the manifest."""
        return self.manifest.summary

    @functools.cached_property
    def _by_table(self) -> dict[str, list[File]]:
        tables: dict[str, list[File]] = {}
        for file in self.manifest.files:
            if file.rows is not None:
                tables.setdefault(_table_of(file.name), []).append(file)
        return {table: sorted(files, key=lambda file: file.name) for table, files in sorted(tables.items())}

    def parts(self, table: str) -> list[str]:
        """File names of a table, `<table>.parquet` or `<table>-00000.parquet ...`, in order."""
        if table not in self._by_table:
            raise ArtefactError(f"{self.url}: has no table {table!r}; it has {', '.join(self.tables)}")
        return [file.name for file in self._by_table[table]]

    def files(self, table: str) -> list[Path]:
        """The files of a table on this machine, in order."""
        return [self.path / name for name in self.parts(table)]

    @property
    def tables(self) -> list[str]:
        """Names of the Parquet tables inside."""
        return list(self._by_table)

    def rows(self, table: str) -> int:
        """Rows of a table, from the manifest."""
        return sum(file.rows or 0 for file in self._by_table.get(table, ()))

    def row_groups(self, table: str) -> Iterator[list[int]]:
        """Rows of each row group of each part of a table."""
        for name in self.parts(table):
            with self.open_part(name) as file:
                yield [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]

    @contextmanager
    def open_part(self, name: str) -> Iterator[pq.ParquetFile]:
        """One part of a table, to read some row groups of."""
        # buffered reads: by default whole row groups are held, which for encoded images are large
        with pq.ParquetFile(self.path / name, buffer_size=2**20, pre_buffer=False) as file:
            yield file

    def read_part(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """One part of a table, or some of its columns, in memory."""
        return read_part(self.path / name, columns)

    def read(self, table: str, columns: list[str] | None = None) -> pa.Table:
        """A whole table, or some of its columns, in memory."""
        return pa.concat_tables(list(self.iter_parts(table, columns)))

    def iter_parts(self, table: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The parts of a table, one at a time, in order."""
        for name in self.parts(table):
            yield self.read_part(name, columns)

    def iter_batches(self, table: str, columns: list[str] | None = None, n_rows: int = 1024) -> Iterator[pa.RecordBatch]:
        """A table in order, at most `n_rows` rows at a time: what is needed for tables with large values."""
        for name in self.parts(table):
            with self.open_part(name) as file:
                yield from file.iter_batches(batch_size=n_rows, columns=columns)

    @property
    def children(self) -> list[str]:
        """Names of the artefacts inside."""
        return [child for file in self.manifest.files if (child := _child_of(file.name))]

    def child(self, name: str, kind: str) -> "Artefact":
        """An artefact inside this one.

        Raises:
            ArtefactError: there is none of this name and kind, it is damaged, or not the one that this manifest lists.
        """
        if name not in self.children:
            raise ArtefactError(f"{self.url}: has no {name!r} inside; it has {', '.join(self.children) or 'none'}")
        child = open_artefact(self.path / name, kind)
        listed = next(file for file in self.manifest.files if file.name == f"{name}/{MANIFEST}")
        if child.digest != listed.sha256:
            _raise_damage(self.url, [f"{listed.name}: checksum differs"])
        return child

    def verify(self) -> None:
        """Read every byte, of children too, and compare checksums.

        Raises:
            ArtefactError: naming every file that differs.
        """
        _raise_damage(self.url, list(self._iter_damage()))

    def _iter_damage(self) -> Iterator[str]:
        for file in self.manifest.files:
            path = self.path / file.name
            if not path.exists():
                yield f"{file.name}: missing"
            elif _sha256(path) != file.sha256:
                yield f"{file.name}: checksum differs"
            elif child := _child_of(file.name):
                inside = Artefact(path.parent, _parse(path.parent, path.read_bytes()), file.sha256)
                yield from (f"{child}/{damage}" for damage in inside._iter_damage())


def open_artefact(path: Path | str, kind: str) -> Artefact:
    """Open an artefact, checking manifest, files and sizes.

    Raises:
        ArtefactError: missing, of another kind or version, or damaged; all damage is named at once.
    """
    path = Path(path)
    text = _read_manifest(path, kind)
    manifest = _parse(path, text)
    if manifest.kind != kind:
        raise ArtefactError(f"{path}: holds {manifest.kind}, expected {kind}")
    _raise_damage(str(path), _size_damage(path, manifest.files))
    return Artefact(path, manifest, hashlib.sha256(text).hexdigest())


class Writer:
    """Where the files of a draft are written, each whole or not at all; many processes may hold one.

    Two that write the same file do not harm one another: each writes aside under a name of its own, and the last one's stays.
    """

    def __init__(self, path: Path, scratch: Path):
        self.path = path
        self._scratch = scratch
        self._described: dict[str, File] = {}

    @property
    def url(self) -> str:
        """What `Draft.attach` takes in another process."""
        return str(self.path)

    @property
    def scratch(self) -> Path:
        """Folder on this machine for chunks and checkpoints; removed when the artefact is sealed."""
        return self._scratch

    def has(self, name: str) -> bool:
        """Whether this file was finished, now or by a run that died."""
        return (self.path / name).exists()

    def names(self, folder: str = "") -> list[str]:
        """Finished files of the draft or of a folder in it, in order, by one listing."""
        found = _sizes(self.path / folder)
        return sorted(f"{folder}/{name}" if folder else name for name in found if not name.endswith(".tmp"))

    def read(self, name: str, filters: list[tuple[str, str, Any]] | None = None) -> pa.Table:
        """A finished Parquet file, or its rows that pass `filters`."""
        no_partitions: Any = None  # folders named a=b are not columns
        return pq.read_table(self.path / name, filters=filters, partitioning=no_partitions)

    def read_json(self, name: str) -> Any:
        """What a finished JSON file holds."""
        return json.loads((self.path / name).read_bytes())

    def write_table(self, name: str, table: pa.Table, **parquet_options: Any) -> File:
        """Write one Parquet file, whole or not at all; `name` is `<table>.parquet` or made by `part_name`."""
        with self.write_file(name) as path:
            pq.write_table(table, path, **parquet_options)
        return self.describe(name)

    @contextmanager
    def write_file(self, name: str) -> Iterator[Path]:
        """A path to write to; when the block ends without an error the file is synced and gets its name.

        Raises:
            ArtefactError: the disk is full, or may not be written to.
        """
        path = self.path / name
        aside = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        with _writing(path):
            if "/" in name:
                path.parent.mkdir(exist_ok=True)
            try:
                yield aside
                sync(aside)
                described = None if name.startswith((f"{SCRATCH}/", f"{RECEIPTS}/")) else _describe(aside, name)
                os.replace(aside, path)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise
        if described:
            self._described[name] = described

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, whole or not at all."""
        with self.write_file(name) as path:
            path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def describe(self, name: str) -> File:
        """Size, checksum and rows of a finished file; what this process wrote is not read again."""
        if name not in self._described:
            self._described[name] = _describe(self.path / name, name)
        return self._described[name]

    def share(self, name: str, to: str) -> File:
        """Give a finished file a second name, such as `b/embeddings-00000.parquet`, without a second copy on the disk."""
        path = self.path / to
        aside = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        with _writing(path):
            path.parent.mkdir(exist_ok=True)
            _link(self.path / name, aside)
            os.replace(aside, path)
            aside.unlink(missing_ok=True)  # rename does nothing where both are links to one file already
        sync(path.parent)
        file = self.describe(name)
        self._described[to] = File(to, file.bytes, file.sha256, file.rows)
        return self._described[to]

    def __reduce__(self) -> tuple[Callable[[str], "Writer"], tuple[str]]:
        return Draft.attach, (self.url,)


class Draft(Writer):
    """An artefact in the making: a directory of its own, kept when the process dies, continued when it runs again."""

    published: Artefact | None = None
    """Set where another process published this very artefact while this one waited for it: there is nothing to make."""

    def __init__(self, path: Path, kind: str, params: Mapping[str, Any], inputs: Mapping[str, str], scratch: Path):
        super().__init__(path, scratch)
        self.kind = kind
        self._params = dict(params)
        self._inputs = dict(inputs)
        self._made: Artefact | None = None

    @staticmethod
    def attach(url: str) -> Writer:
        """A worker process's hold on a draft that the driver has open: it writes files, and neither locks nor cleans.

        Raises:
            ArtefactError: there is no such draft.
        """
        path = Path(url)
        if not path.is_dir():
            raise ArtefactError(f"{path}: there is no draft here to write to; its run has ended, or this machine does not see its folder")
        return Writer(path, path / SCRATCH)

    def child(self, name: str, kind: str) -> "Draft":
        """An artefact inside this one, with the same params and inputs and a manifest of its own; seal it first."""
        with _writing(self.path / name):
            (self.path / name).mkdir(exist_ok=True)
        child = Draft(self.path / name, kind, self._params, self._inputs, self._scratch)
        mine = f"{name}/"
        child._described = {
            name.removeprefix(mine): File(name.removeprefix(mine), file.bytes, file.sha256, file.rows)
            for name, file in self._described.items()
            if name.startswith(mine)
        }
        return child

    def sealed(self) -> Artefact | None:
        """The artefact, if the manifest is written already: the process died before publishing."""
        if not self.has(MANIFEST):
            return None
        self._clean()
        return open_artefact(self.path, self.kind)

    def seal(self, summary: Mapping[str, Any], files: Sequence[File] | None = None) -> Artefact:
        """Write the manifest over all files and children, and drop scratch folder and receipts.

        Args:
            summary: Statistics for the quality gate and later stages.
            files: Descriptions of files that workers wrote: these are not read again. Others are described here.

        Raises:
            ArtefactError: a file that `files` describes is missing or of another size.
        """
        given = self._described | {file.name: file for file in files or ()}
        found = _sizes(self.path) | self._child_manifests()
        _raise_damage(str(self.path), _differences(found, [given[file.name] for file in files or ()]))
        listed = tuple(given[name] if name in given else _describe(self.path / name, name) for name in sorted(found) if name != MANIFEST)
        plain = json.loads(json.dumps([self._params, summary]))  # as a reader will find it: lists for tuples
        manifest = Manifest(self.kind, SCHEMA_VERSION, plain[0], self._inputs, listed, _versions(), plain[1])
        text = manifest.to_json()
        with self.write_file(MANIFEST) as path:
            path.write_bytes(text)
        sync(self.path)
        self._clean()
        self._made = Artefact(self.path, manifest, hashlib.sha256(text).hexdigest())
        return self._made

    def _child_manifests(self) -> dict[str, int]:
        """Size of each child's manifest by its name in this artefact."""
        manifests = [self.path / name / MANIFEST for name in _folders(self.path) if name not in (SCRATCH, RECEIPTS)]
        assert all(path.exists() for path in manifests), f"{self.path}: a child is not sealed: {manifests}"
        return {f"{path.parent.name}/{MANIFEST}": path.stat().st_size for path in manifests}

    def _clean(self) -> None:
        for name in (SCRATCH, RECEIPTS):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def discard(self) -> None:
        """Remove the draft: its gate failed, so nothing of it may be continued."""
        shutil.rmtree(self.path)

    def publish(self, place: Path) -> Artefact:
        """Move the sealed draft to `place`, replacing what was there."""
        assert self.has(MANIFEST), f"{self.path} is not sealed"
        made = self._made or open_artefact(self.path, self.kind)
        old = self.path.with_name(self.path.name + ".old")
        with _writing(place):
            if old.exists():
                shutil.rmtree(old)
            if place.exists():
                os.rename(place, old)
            os.rename(self.path, place)
            sync(place.parent)
            _note_published(self.path, made.digest)
            if old.exists():
                shutil.rmtree(old)
        return Artefact(place, made.manifest, made.digest)


@contextmanager
def open_draft(
    place: Path,
    kind: str,
    params: Mapping[str, Any],
    inputs: Mapping[str, Artefact],
    on_wait: Callable[[str], None] = lambda line: None,
) -> Iterator[Draft]:
    """The draft of the artefact that will be at `place`, locked; drafts made by other params, inputs or code are removed.

    Where another process holds it, this one waits for it, and looks at `Draft.published` afterwards.

    Args:
        place: Where the artefact goes.
        kind: Its kind.
        params: The section of Params, without what only says how to compute.
        inputs: Artefacts that it is made from.
        on_wait: Hears one line when another process is making the artefact now.

    Raises:
        ArtefactError: the folder may not be written to.
    """
    work = place.parent / ".work"
    key = _key(kind, params, inputs)
    path = work / f"{place.name}-{key}"
    lock = filelock.FileLock(work / f"{place.name}.lock")
    with _writing(work):
        work.mkdir(parents=True, exist_ok=True)
        waited = _acquire(lock, lambda: on_wait(f"waiting for another process that makes {place}"))
    try:
        with _writing(work):
            _remove_others(work, place.name, path)
            published = _published(place, kind, path) if waited else None
            if published is None:
                (path / SCRATCH).mkdir(parents=True, exist_ok=True)
        digests = {name: artefact.digest for name, artefact in inputs.items()}
        draft = Draft(path, kind, params, digests, path / SCRATCH)
        draft.published = published
        yield draft
    finally:
        lock.release()


def _acquire(lock: filelock.BaseFileLock, on_wait: Callable[[], None]) -> bool:
    """Lock; gives whether it took waiting."""
    try:
        lock.acquire(timeout=0)
        return False
    except filelock.Timeout:
        on_wait()
        lock.acquire(timeout=-1)
        return True


def _remove_others(work: Path, name: str, mine: Path) -> None:
    """Drafts of other params, inputs or code, and what dead writers left in this one."""
    for other in work.glob(f"{name}-*"):
        if other != mine:
            shutil.rmtree(other)
    for leftover in mine.rglob("*.tmp"):
        if leftover.is_file():
            leftover.unlink()


def _note_published(draft: Path, digest: str) -> None:
    """Remember beside the lock which draft became what: a process that waited knows its own artefact by it."""
    name = draft.name.rpartition("-")[0]
    note = draft.with_name(f"{name}.published")
    aside = note.with_suffix(".tmp")
    aside.write_text(f"{draft.name} {digest}\n", encoding="utf-8")
    os.replace(aside, note)


def _published(place: Path, kind: str, draft: Path) -> Artefact | None:
    """The artefact at `place`, where it was made of the same params, inputs and code as this draft would be."""
    note = draft.with_name(f"{place.name}.published")
    if not note.exists():
        return None
    name, _, digest = note.read_text(encoding="utf-8").strip().rpartition(" ")
    if name != draft.name or not (place / MANIFEST).exists() or _sha256(place / MANIFEST) != digest:
        return None
    return open_artefact(place, kind)


def read_part(path: Path, columns: list[str] | None = None) -> pa.Table:
    """One Parquet file, or some of its columns, in memory."""
    with pq.ParquetFile(path) as file:
        return file.read(columns)


def part_name(table: str, index: int) -> str:
    """File name of a table's part: `train-00003.parquet`."""
    return f"{table}-{index:05d}.parquet"


def describe(path: Path) -> File:
    """Size, checksum and rows of a file on this machine."""
    return _describe(path, path.name)


def _table_of(name: str) -> str:
    stem = name.removesuffix(".parquet")
    head, dash, tail = stem.rpartition("-")
    return head if dash and tail.isdigit() else stem


def _child_of(name: str) -> str | None:
    """Name of the child whose manifest this file is."""
    return name.removesuffix(f"/{MANIFEST}") if name.endswith(f"/{MANIFEST}") else None


def _key(kind: str, params: Mapping[str, Any], inputs: Mapping[str, Artefact]) -> str:
    parts = [kind, dict(params), {name: a.digest for name, a in inputs.items()}, _code_digest(), SCHEMA_VERSION]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _code_digest() -> str:
    """sha256 of this package's sources: a draft is only continued by the code that began it."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    libraries = ("ommatid", "torch", "transformers", "numpy", "pyarrow", "duckdb", "pillow")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in libraries}}


def _describe(path: Path, name: str) -> File:
    rows = pq.read_metadata(path).num_rows if name.endswith(".parquet") else None
    return File(name, path.stat().st_size, _sha256(path), rows)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV):
            raise
        shutil.copyfile(path, to)  # a file system without links, or a file that has too many
        sync(to)


def _sizes(folder: Path) -> dict[str, int]:
    """Size of every file of a folder by name: one listing, for there may be millions."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    except FileNotFoundError:
        return {}


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _read_manifest(path: Path, kind: str) -> bytes:
    try:
        return (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        stage = _MADE_BY[kind]
        what = "has no manifest.json, so it is not whole" if path.exists() else "does not exist"
        raise ArtefactError(f"{path}: {what}; make it with `dvc repro {stage}` (or `ommatid {stage}`)") from None


_MADE_BY = {
    "images": "images",
    "extraction": "extract",
    "activations": "extract",
    "sae": "train",
    "evaluation": "evaluate",
    "labels": "label",
    "catalog": "catalog",
}


def _parse(path: Path, text: bytes) -> Manifest:
    try:
        return Manifest.from_json(text)
    except ArtefactError as error:
        raise ArtefactError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path / MANIFEST}: not a manifest ({error}); delete {path} and run the stage again") from None


def _size_damage(path: Path, files: Sequence[File]) -> list[str]:
    """What is missing or of another size; children are looked at by their manifests."""
    found = _sizes(path)
    for file in files:
        if (child := _child_of(file.name)) and (path / file.name).exists():
            found[f"{child}/{MANIFEST}"] = (path / file.name).stat().st_size
    return _differences(found, files)


def _differences(found: Mapping[str, int], files: Sequence[File]) -> list[str]:
    missing = [f"{file.name}: missing" for file in files if file.name not in found]
    wrong = [(file, found[file.name]) for file in files if found.get(file.name, file.bytes) != file.bytes]
    return missing + [f"{file.name}: {size} bytes, the manifest says {file.bytes}" for file, size in wrong]


_MOST_NAMED = 100
"""Files that an error names; the rest are counted."""


def _raise_damage(url: str, damage: list[str]) -> None:
    if damage:
        more = f"; and {len(damage) - _MOST_NAMED} more" if len(damage) > _MOST_NAMED else ""
        raise ArtefactError(
            f"{url}: damaged ({len(damage)}): {'; '.join(damage[:_MOST_NAMED])}{more}; "
            "bring it back with `dvc checkout`, or delete the folder and run `dvc repro`"
        )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing(path)).free
            raise ArtefactError(
                f"{path}: the disk is full ({free / 1e6:.0f} MB free); make room and run the stage again: what is finished is kept"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise ArtefactError(
                f"{path}: cannot be written ({os.strerror(error.errno).lower()}); make {_existing(path)} writable for this user "
                "and run the stage again: what is finished is kept"
            ) from error
        raise


def _existing(path: Path) -> Path:
    """The nearest folder that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
