"""Artefacts: folders of Parquet parts and a manifest, written aside as drafts and moved into place whole.

A folder is on a disk or in an object store (see folder.py). What belongs to a machine is on its disk: locks, scratch files, and copies of
objects for those who need a path. The lock holds among the processes of one machine. Two machines that make the same artefact write the
same bytes under the same names, each whole; when one has taken the draft away, the other finds out before it seals, and stops.
"""

import functools
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa
import pyarrow.parquet as pq

from ommatid.errors import ArtefactError
from ommatid.folder import READ_BYTES, Disk, Folder, aside_of, is_aside, open_folder, writing
from ommatid.folder import sync as sync
from ommatid.schemas import SCHEMA_VERSION

MANIFEST = "manifest.json"
SCRATCH = "scratch"
"""Folder of a draft, on this machine only, whose files (chunks, checkpoints) never become part of the artefact."""
WORK = Path("data/.work")
"""Where a machine keeps its scratch files and locks of drafts that are in an object store."""
CACHE = Path("data/.cache")
"""Copies of objects, by the digest of their artefact's manifest; may be deleted at any time."""
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
    """images, extraction, training, evaluations, labellings or catalog; of what is inside one: see `INSIDE`."""
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

    def iter_json(self) -> Iterator[bytes]:
        """The text of manifest.json, piece by piece: a line a file, for there may be millions."""
        values = {name: getattr(self, name) for name in ("kind", "schema_version", "params", "inputs", "versions", "summary")}
        yield json.dumps(values, indent=2, sort_keys=True).removesuffix("\n}").encode() + b',\n  "files": ['
        for i, file in enumerate(self.files):
            line = json.dumps({"bytes": file.bytes, "name": file.name, "rows": file.rows, "sha256": file.sha256})
            yield f"{',' if i else ''}\n    {line}".encode()
        yield b"\n  ]\n}\n"

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

INSIDE = {"extraction": "activations", "training": "sae", "evaluations": "evaluation", "labellings": "labels"}
"""Kind of the artefacts inside one of this kind: one a hookpoint, or one an SAE."""


class Artefact:
    """A finished artefact, opened read-only."""

    def __init__(self, folder: Folder, manifest: Manifest, digest: str):
        self.folder = folder
        self.manifest = manifest
        self.digest = digest
        """sha256 of manifest.json: stands for the whole content."""
        self._footers: dict[str, pq.FileMetaData] = {}

    @property
    def url(self) -> str:
        """Where it is, in words that `open_artefact` takes."""
        return self.folder.url

    @property
    def path(self) -> Path:
        """A folder on this machine with all its files; objects are copied to `CACHE` first. For small ones: see `file`, `open_part`."""
        if isinstance(self.folder, Disk):
            return self.folder.path
        for file in self.manifest.files:
            self.file(file.name)
        return self._cache

    def file(self, name: str) -> Path:
        """One file on this machine; an object is copied to `CACHE`, once.

        Raises:
            ArtefactError: what came is not what the manifest says.
        """
        if isinstance(self.folder, Disk):
            return self.folder.path / name
        path, listed = self._cache / name, self._by_name[name]
        if not path.exists() or path.stat().st_size != listed.bytes:
            self.folder.fetch(name, path, listed.sha256)
        return path

    def local(self, name: str) -> Path | None:
        """Where a file lies, if that is a disk of this machine."""
        return self.folder.path / name if isinstance(self.folder, Disk) else None

    @property
    def _cache(self) -> Path:
        return CACHE / f"{self.folder.name}-{self.digest[:16]}"

    @property
    def summary(self) -> dict[str, Any]:
        """Statistics that the stage wrote into the manifest."""
        return self.manifest.summary

    @functools.cached_property
    def _by_name(self) -> dict[str, File]:
        return {file.name: file for file in self.manifest.files}

    @functools.cached_property
    def _by_table(self) -> dict[str, list[File]]:
        tables: dict[str, list[File]] = {}
        for file in self.manifest.files:
            if file.rows is not None:
                tables.setdefault(_table_of(file.name), []).append(file)
        # by length first: part 100000 comes after 99999
        return {table: sorted(files, key=lambda file: (len(file.name), file.name)) for table, files in sorted(tables.items())}

    def parts(self, table: str) -> list[str]:
        """File names of a table, `<table>.parquet` or `<table>-00000.parquet ...`, in order."""
        if table not in self._by_table:
            raise ArtefactError(f"{self.url}: has no table {table!r}; it has {', '.join(self.tables)}")
        return [file.name for file in self._by_table[table]]

    def files(self, table: str) -> list[Path]:
        """The files of a table on this machine, in order; objects are copied to `CACHE`, once."""
        return [self.file(name) for name in self.parts(table)]

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
        if isinstance(self.folder, Disk):
            with pq.ParquetFile(self.folder.path / name, buffer_size=2**20, pre_buffer=False) as file:
                yield file
            return
        source = self.folder.open(name, self._by_name[name].bytes)
        with pq.ParquetFile(source, metadata=self._footers.get(name), buffer_size=READ_BYTES, pre_buffer=False) as file:
            if len(self._footers) < _FOOTERS_KEPT:
                self._footers[name] = file.metadata
            yield file

    def read_part(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """One part of a table, or some of its columns, in memory."""
        if isinstance(self.folder, Disk):
            return read_part(self.folder.path / name, columns)
        with pq.ParquetFile(self.folder.open(name, self._by_name[name].bytes), pre_buffer=True) as file:
            return file.read(columns)

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
        child = open_artefact(self.folder / name, kind)
        listed = self._by_name[f"{name}/{MANIFEST}"]
        if child.digest != listed.sha256:
            _raise_damage(self.folder, [f"{listed.name}: checksum differs"])
        return child

    def each(self) -> dict[str, "Artefact"]:
        """All artefacts inside this one, by name.

        Raises:
            ArtefactError: one is damaged, or not the one that this manifest lists.
        """
        return {name: self.child(name, INSIDE[self.manifest.kind]) for name in self.children}

    def verify(self) -> None:
        """Read every byte, of children too, and compare checksums.

        Raises:
            ArtefactError: naming every file that differs.
        """
        _raise_damage(self.folder, list(self._iter_damage()))

    def _iter_damage(self) -> Iterator[str]:
        for file in self.manifest.files:
            size = self.folder.size(file.name)
            if size is None:
                yield f"{file.name}: missing"
            elif size != file.bytes or self.folder.sha256(file.name, size) != file.sha256:
                yield f"{file.name}: checksum differs"
            elif child := _child_of(file.name):
                folder = self.folder / child
                inside = Artefact(folder, _parse(folder, folder.read_bytes(MANIFEST)), file.sha256)
                yield from (f"{child}/{damage}" for damage in inside._iter_damage())


_FOOTERS_KEPT = 1024
"""Footers of parts in an object store that an artefact remembers: whoever reads row groups here and there asks for each once."""


def open_artefact(place: Folder | Path | str, kind: str) -> Artefact:
    """Open an artefact at a path or URL, checking manifest, files and sizes.

    Raises:
        ArtefactError: missing, of another kind or version, or damaged (all damage is named at once); or a URL that cannot be reached.
    """
    folder = open_folder(place)
    text = _read_manifest(folder, kind)
    digest = hashlib.sha256(text).hexdigest()
    manifest = _parse(folder, text)
    del text  # of a million shards some hundred megabytes
    if manifest.kind != kind:
        raise ArtefactError(f"{folder}: holds {manifest.kind}, expected {kind}")
    _raise_damage(folder, _size_damage(folder, manifest.files))
    return Artefact(folder, manifest, digest)


class Writer:
    """Where the files of a draft are written, each whole or not at all; many processes may hold one.

    Two that write the same file do not harm one another: each writes aside under a name of its own, and the last one's stays.
    """

    def __init__(self, folder: Folder, here: Path):
        self.folder = folder
        self._top = folder
        self._here = here
        self._described: dict[str, File] = {}

    @property
    def url(self) -> str:
        """What `Draft.attach` takes in another process."""
        return self.folder.url

    @property
    def path(self) -> Path:
        """The draft's folder on this machine, which holds `scratch`; finished files are there only where the draft is on a disk."""
        return self._here

    @property
    def scratch(self) -> Path:
        """Folder on this machine for chunks and checkpoints; removed when the artefact is sealed."""
        return self._here / SCRATCH

    def _home(self, name: str) -> Folder:
        return Disk(self._here) if name.startswith(f"{SCRATCH}/") else self.folder

    def has(self, name: str) -> bool:
        """Whether this file was finished, now or by a run that died. For many files ask `names` once."""
        return self._home(name).size(name) is not None

    def names(self, inside: str = "") -> list[str]:
        """Finished files of the draft, or of a folder in it, in order, by one listing."""
        return sorted(f"{inside}/{name}" if inside else name for name in self._home(f"{inside}/").sizes(inside) if name != _OPEN)

    def read(self, name: str, filters: list[tuple[str, str, Any]] | None = None, columns: list[str] | None = None) -> pa.Table:
        """A finished Parquet file, or its rows that pass `filters`, or some of its columns."""
        home = self._home(name)
        no_partitions: Any = None  # folders named a=b are not columns
        with self._still_mine():
            source = home.path / name if isinstance(home, Disk) else home.open(name)
            return pq.read_table(source, columns=columns, filters=filters, partitioning=no_partitions)

    def read_json(self, name: str) -> Any:
        """What a finished JSON file holds."""
        with self._still_mine():
            return json.loads(self._home(name).read_bytes(name))

    def iter_json(self, names: Sequence[str]) -> Iterator[Any]:
        """What many finished JSON files hold, in order; from an object store many are read at a time."""
        with self._still_mine():
            for text in self.folder.iter_bytes(names):
                yield json.loads(text)

    @contextmanager
    def _still_mine(self) -> Iterator[None]:
        """A file that is not there is looked for no further where another machine took the whole draft."""
        try:
            yield
        except FileNotFoundError:
            self._check_open()
            raise

    def _check_open(self) -> None:
        if not isinstance(self._top, Disk) and self._top.size(_OPEN) is None:
            raise ArtefactError(
                f"{self._top}: this draft was published or removed by another machine, which makes the same one or one with other params; "
                "make an artefact on one machine at a time; run the stage again if it is not there now"
            )

    def local(self, name: str) -> Path:
        """A finished file on this machine; an object is copied to the scratch folder, once."""
        home = self._home(name)
        if isinstance(home, Disk):
            return home.path / name
        path = self.scratch / "fetched" / self.folder.name / name  # children share the scratch folder
        if not path.exists():
            home.fetch(name, path)
        return path

    def write_table(self, name: str, table: pa.Table, **parquet_options: Any) -> File:
        """Write one Parquet file, whole or not at all; `name` is `<table>.parquet` or made by `part_name`."""
        with self.write_file(name) as path:
            pq.write_table(table, path, **parquet_options)
        return self.describe(name)

    @contextmanager
    def write_file(self, name: str) -> Iterator[Path]:
        """A path to write to; when the block ends without an error the file is synced and gets its name.

        Raises:
            ArtefactError: the disk is full, or may not be written to; the store cannot be reached.
        """
        home = self._home(name)
        path = home.path / name if isinstance(home, Disk) else self.scratch / name.replace("/", "-")
        aside = aside_of(path)
        with writing(path):
            if "/" in name and isinstance(home, Disk):
                path.parent.mkdir(exist_ok=True)
            try:
                yield aside
                described = None if name.startswith((f"{SCRATCH}/", f"{RECEIPTS}/")) else _describe_path(aside, name)
                home.put(aside, name)
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
            self._described[name] = _describe(self.folder, name)
        return self._described[name]

    def share(self, name: str, to: str) -> File:
        """Give a finished file a second name, such as `b/embeddings-00000.parquet`, without a second copy on the disk."""
        with writing(self._here / to):
            self.folder.share(name, to)
        self._described[to] = replace(self.describe(name), name=to)
        return self._described[to]

    def remove(self, name: str) -> None:
        """Remove a finished file, or a folder with all that is in it."""
        self._home(name).remove(name)
        self._described = {own: file for own, file in self._described.items() if own != name and not own.startswith(f"{name}/")}

    def __reduce__(self) -> tuple[Callable[[str], "Writer"], tuple[str]]:
        return Draft.attach, (self.url,)


class Draft(Writer):
    """An artefact in the making: a folder of its own, kept when the process dies, continued when it runs again."""

    published: Artefact | None = None
    """Set where another process published this very artefact while this one waited for it: there is nothing to make."""

    def __init__(self, folder: Folder, here: Path, kind: str, params: Mapping[str, Any], inputs: Mapping[str, str]):
        super().__init__(folder, here)
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
        folder = open_folder(url)
        is_there = folder.path.is_dir() if isinstance(folder, Disk) else folder.size(_OPEN) is not None
        if not is_there:
            raise ArtefactError(f"{url}: there is no draft here to write to; its run has ended, or this machine does not see its folder")
        here = _here(folder)
        if not isinstance(folder, Disk):
            with writing(here):
                _remove_old_scratch(here)
                (here / SCRATCH).mkdir(parents=True, exist_ok=True)
        return Writer(folder, here)

    def child(self, name: str, kind: str, params: Mapping[str, Any] | None = None, inputs: Mapping[str, Artefact] | None = None) -> "Draft":
        """An artefact inside this one, with a manifest of its own; seal it first.

        Args:
            name: Of its folder.
            kind: Its kind.
            params: Those that made it; None: the same as of this one.
            inputs: Artefacts that it is made from; None: the same as of this one.
        """
        folder = self.folder / name
        if isinstance(folder, Disk):
            with writing(folder.path):
                folder.path.mkdir(exist_ok=True)
        digests = self._inputs if inputs is None else _digests(inputs)
        child = Draft(folder, self._here, kind, self._params if params is None else params, digests)
        child._top = self._top
        mine = {own: file for own, file in self._described.items() if own.startswith(f"{name}/")}
        child._described = {(inside := own.removeprefix(f"{name}/")): replace(file, name=inside) for own, file in mine.items()}
        return child

    def sealed(self) -> Artefact | None:
        """The artefact, if the manifest is written already: the process died before publishing."""
        if not self.has(MANIFEST):
            return None
        self._clean()
        return open_artefact(self.folder, self.kind)

    def seal(self, summary: Mapping[str, Any], files: Sequence[File] | None = None) -> Artefact:
        """Write the manifest over all files and children, and drop scratch folder and receipts.

        Args:
            summary: Statistics for the quality gate and later stages.
            files: Descriptions of files that workers wrote: these are not read again. Others are described here.

        Raises:
            ArtefactError: a file that `files` describes is missing or of another size; or another machine took the draft away.
        """
        given = self._described | {file.name: file for file in files or ()}
        found = self.folder.sizes() | self._child_manifests()
        self._check_open()  # after the listing: what it lacks then was never there
        _raise_damage(self.folder, _differences(found, [given[file.name] for file in files or ()]))
        names = sorted(name for name in found if name not in (MANIFEST, _OPEN))
        listed = tuple(given[name] if name in given else _describe(self.folder, name) for name in names)
        plain = json.loads(json.dumps([self._params, summary]))  # as a reader will find it: lists for tuples
        manifest = Manifest(self.kind, SCHEMA_VERSION, plain[0], self._inputs, listed, _versions(), plain[1])
        with self.write_file(MANIFEST) as path, path.open("wb") as file:
            file.writelines(manifest.iter_json())
        self._clean()
        self._made = Artefact(self.folder, manifest, self.describe(MANIFEST).sha256)
        return self._made

    def _child_manifests(self) -> dict[str, int]:
        """Size of each child's manifest by its name in this artefact."""
        names = [f"{name}/{MANIFEST}" for name in self.folder.folders() if name not in (SCRATCH, RECEIPTS)]
        sizes = {name: self.folder.size(name) for name in names}
        unsealed = [name for name, size in sizes.items() if size is None]
        assert not unsealed, f"{self.url}: a child is not sealed: {unsealed}"
        return {name: size for name, size in sizes.items() if size is not None}

    def _clean(self) -> None:
        """Drop what is not part of the artefact; a child has nothing of that kind."""
        if self.folder is self._top:
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.folder.remove(_OPEN)  # first: who misses a receipt then knows why
            self.folder.remove(RECEIPTS)

    def discard(self) -> None:
        """Remove the draft: its gate failed, so nothing of it may be continued."""
        self.folder.remove("")
        shutil.rmtree(self._here, ignore_errors=True)

    def publish(self, place: Folder | Path | str) -> Artefact:
        """Move the sealed draft to `place`, replacing what was there."""
        assert self.has(MANIFEST), f"{self.url} is not sealed"
        target = open_folder(place)
        made = self._made or open_artefact(self.folder, self.kind)
        with writing(self._here):
            self.folder.move(target, last=MANIFEST)
            _note_published(self._here, made.digest)
            shutil.rmtree(self._here, ignore_errors=True)
        return Artefact(target, made.manifest, made.digest)


_OPEN = ".open"
"""Object that marks a draft in an object store, which has no folders: workers see that it is there, and the driver that it may write."""


@contextmanager
def open_draft(
    place: Folder | Path | str,
    kind: str,
    params: Mapping[str, Any],
    inputs: Mapping[str, Artefact],
    on_wait: Callable[[str], None] = lambda line: None,
) -> Iterator[Draft]:
    """The draft of the artefact that will be at `place`, locked; drafts made by other params, inputs or code are removed.

    Where another process of this machine holds it, this one waits for it, and looks at `Draft.published` afterwards.

    Args:
        place: Where the artefact goes, a path or URL.
        kind: Its kind.
        params: The section of Params, without what only says how to compute.
        inputs: Artefacts that it is made from.
        on_wait: Hears one line when another process is making the artefact now.

    Raises:
        ArtefactError: the folder may not be written to, or not be reached.
    """
    target = open_folder(place)
    folder = target.parent / ".work" / f"{target.name}-{_key(kind, params, inputs)}"
    here = _here(folder)
    lock = filelock.FileLock(here.parent / f"{target.name}.lock")
    with writing(here.parent):
        here.parent.mkdir(parents=True, exist_ok=True)
        waited = _acquire(lock, lambda: on_wait(f"waiting for another process that makes {target}"))
    try:
        with writing(here.parent):
            for drafts in {folder.parent.url: folder.parent, str(here.parent): Disk(here.parent)}.values():
                _remove_others(drafts, target.name, folder.name)
            _remove_asides(here)
            published = _published(target, kind, here) if waited else None
            if published is None:
                _begin(folder, here)
        draft = Draft(folder, here, kind, params, _digests(inputs))
        draft.published = published
        yield draft
    finally:
        lock.release()


def _here(folder: Folder) -> Path:
    """Where this machine keeps what a draft has on its disk: the draft itself, or a folder that stands for it."""
    if isinstance(folder, Disk):
        return folder.path
    root = hashlib.sha256(folder.parent.parent.url.encode()).hexdigest()[:8]
    return WORK / root / folder.name


def _acquire(lock: filelock.BaseFileLock, on_wait: Callable[[], None]) -> bool:
    """Lock; gives whether it took waiting."""
    try:
        lock.acquire(timeout=0)
        return False
    except filelock.Timeout:
        on_wait()
        lock.acquire(timeout=-1)
        return True


def _remove_others(drafts: Folder, name: str, mine: str) -> None:
    """Drafts of other params, inputs or code."""
    for other in drafts.folders():
        if _artefact_of(other) == name and other != mine:
            drafts.remove(f"{other}/{_OPEN}")  # first: another machine that is at work there finds out
            drafts.remove(other)


def _artefact_of(draft: str) -> str:
    """Name of the artefact that a draft's folder is for."""
    return draft.rpartition("-")[0]


def _remove_old_scratch(here: Path) -> None:
    """What workers that died left on their own machine, where no driver looks, of drafts that are no longer."""
    for other in Disk(here.parent).folders():
        if _artefact_of(other) == _artefact_of(here.name) and other != here.name:
            shutil.rmtree(here.parent / other, ignore_errors=True)  # another worker may remove it, too


def _remove_asides(here: Path) -> None:
    """What dead writers left: files, and folders that were to become chunks."""
    for leftover in [path for path in here.rglob("*") if is_aside(path.name)]:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)


def _begin(folder: Folder, here: Path) -> None:
    (here / SCRATCH).mkdir(parents=True, exist_ok=True)
    if not isinstance(folder, Disk):
        mark = here / SCRATCH / _OPEN
        mark.touch()
        folder.put(mark, _OPEN)


def _note_published(here: Path, digest: str) -> None:
    """Remember beside the lock which draft became what: a process that waited knows its own artefact by it."""
    note = here.with_name(f"{_artefact_of(here.name)}.published")
    aside = aside_of(note)
    aside.write_text(f"{here.name} {digest}\n", encoding="utf-8")
    os.replace(aside, note)


def _published(target: Folder, kind: str, here: Path) -> Artefact | None:
    """The artefact at `target`, where it was made of the same params, inputs and code as this draft would be."""
    note = here.with_name(f"{target.name}.published")
    if not note.exists():
        return None
    name, _, digest = note.read_text(encoding="utf-8").strip().rpartition(" ")
    if name != here.name or target.size(MANIFEST) is None or target.sha256(MANIFEST) != digest:
        return None
    return open_artefact(target, kind)


def read_part(path: Path, columns: list[str] | None = None) -> pa.Table:
    """One Parquet file, or some of its columns, in memory."""
    with pq.ParquetFile(path) as file:
        return file.read(columns)


def part_name(table: str, index: int) -> str:
    """File name of a table's part: `train-00003.parquet`."""
    return f"{table}-{index:05d}.parquet"


def describe(path: Path) -> File:
    """Size, checksum and rows of a file on this machine."""
    return _describe_path(path, path.name)


def _describe_path(path: Path, name: str) -> File:
    """Of a file on this machine whose name will be `name`."""
    rows = pq.read_metadata(path).num_rows if name.endswith(".parquet") else None
    return File(name, path.stat().st_size, Disk(path.parent).sha256(path.name), rows)


def _describe(folder: Folder, name: str) -> File:
    size = folder.size(name)
    assert size is not None, f"{folder}: has no {name}"
    rows = None
    if name.endswith(".parquet"):
        with folder.open(name, size) as file:
            rows = pq.read_metadata(file).num_rows
    return File(name, size, folder.sha256(name, size), rows)


def _table_of(name: str) -> str:
    stem = name.removesuffix(".parquet")
    head, dash, tail = stem.rpartition("-")
    return head if dash and tail.isdigit() else stem


def _child_of(name: str) -> str | None:
    """Name of the child whose manifest this file is."""
    return name.removesuffix(f"/{MANIFEST}") if name.endswith(f"/{MANIFEST}") else None


def _key(kind: str, params: Mapping[str, Any], inputs: Mapping[str, Artefact]) -> str:
    parts = [kind, dict(params), _digests(inputs), _code_digest(), SCHEMA_VERSION]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _digests(inputs: Mapping[str, Artefact]) -> dict[str, str]:
    return {name: artefact.digest for name, artefact in inputs.items()}


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


def _read_manifest(folder: Folder, kind: str) -> bytes:
    try:
        return folder.read_bytes(MANIFEST)
    except FileNotFoundError:
        stage = _MADE_BY[kind]
        what = "has no manifest.json, so it is not whole" if folder.exists() else "does not exist"
        dvc = f"`dvc repro {stage}` (or `ommatid {stage}`)"
        todo = dvc if isinstance(folder, Disk) else f"`ommatid {stage} --data {folder.parent}`"
        raise ArtefactError(f"{folder}: {what}; make it with {todo}") from None


_MADE_BY = {
    "images": "images",
    "extraction": "extract",
    "activations": "extract",
    "training": "train",
    "sae": "train",
    "evaluations": "evaluate",
    "evaluation": "evaluate",
    "labellings": "label",
    "labels": "label",
    "catalog": "catalog",
}


def _parse(folder: Folder, text: bytes) -> Manifest:
    try:
        return Manifest.from_json(text)
    except ArtefactError as error:
        raise ArtefactError(f"{folder}: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{folder / MANIFEST}: not a manifest ({error}); delete {folder} and run the stage again") from None


def _size_damage(folder: Folder, files: Sequence[File]) -> list[str]:
    """What is missing or of another size; children are looked at by their manifests."""
    found = folder.sizes()
    for file in files:
        if _child_of(file.name) and (size := folder.size(file.name)) is not None:
            found[file.name] = size
    return _differences(found, files)


def _differences(found: Mapping[str, int], files: Sequence[File]) -> list[str]:
    missing = [f"{file.name}: missing" for file in files if file.name not in found]
    wrong = [(file, found[file.name]) for file in files if found.get(file.name, file.bytes) != file.bytes]
    return missing + [f"{file.name}: {size} bytes, the manifest says {file.bytes}" for file, size in wrong]


_MOST_NAMED = 100
"""Files that an error names; the rest are counted."""


def _raise_damage(folder: Folder, damage: list[str]) -> None:
    if damage:
        more = f"; and {len(damage) - _MOST_NAMED} more" if len(damage) > _MOST_NAMED else ""
        repro = "bring it back with `dvc checkout`, or delete the folder and run `dvc repro`"
        todo = repro if isinstance(folder, Disk) else "delete what is there and make it again"
        raise ArtefactError(f"{folder}: damaged ({len(damage)}): {'; '.join(damage[:_MOST_NAMED])}{more}; {todo}")
