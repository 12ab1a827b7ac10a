"""Artefacts: directories of Parquet parts and a manifest, written aside as drafts and renamed into place whole."""

import errno
import functools
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
"""Folder of a draft whose files (chunks, checkpoints) never become part of the artefact."""


@dataclass(frozen=True)
class File:
    """One file of an artefact, as its manifest lists it."""

    name: str
    """File name inside the artefact."""
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
    """images, activations, sae, evaluation, labels or catalog."""
    schema_version: int
    """`schemas.SCHEMA_VERSION` of the writer."""
    params: dict[str, Any]
    """The section of Params that made it."""
    inputs: dict[str, str]
    """sha256 of the manifest of each input artefact."""
    files: tuple[File, ...]
    """All files, by name."""
    versions: dict[str, str]
    """Of code and libraries."""
    summary: dict[str, Any]
    """Statistics that the quality gate and later stages read."""


class Artefact:
    """A finished artefact, opened read-only."""

    def __init__(self, path: Path, manifest: Manifest, digest: str):
        self.path = path
        self.manifest = manifest
        self.digest = digest
        """sha256 of manifest.json: stands for the whole content."""

    @property
    def summary(self) -> dict[str, Any]:
        """Statistics that the stage wrote into the manifest."""
        return self.manifest.summary

    def files(self, table: str) -> list[Path]:
        """The Parquet files of a table, `<table>.parquet` or `<table>-00000.parquet ...`, in order."""
        names = [f.name for f in self.manifest.files if f.rows is not None and _table_of(f.name) == table]
        if not names:
            raise ArtefactError(f"{self.path}: has no table {table!r}; it has {', '.join(self.tables)}")
        return [self.path / name for name in sorted(names)]

    @property
    def tables(self) -> list[str]:
        """Names of the Parquet tables inside."""
        return sorted({_table_of(f.name) for f in self.manifest.files if f.rows is not None})

    def rows(self, table: str) -> int:
        """Rows of a table, from the manifest."""
        return sum(f.rows or 0 for f in self.manifest.files if _table_of(f.name) == table)

    def read(self, table: str, columns: list[str] | None = None) -> pa.Table:
        """A whole table, or some of its columns, in memory."""
        return pa.concat_tables(list(self.iter_parts(table, columns)))

    def iter_parts(self, table: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The parts of a table, one at a time, in order."""
        for path in self.files(table):
            yield read_part(path, columns)

    def iter_batches(self, table: str, columns: list[str] | None = None, n_rows: int = 1024) -> Iterator[pa.RecordBatch]:
        """A table in order, at most `n_rows` rows at a time: what is needed for tables with large values."""
        for path in self.files(table):
            # buffered reads: by default whole row groups are held, which for encoded images are large
            with pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
                yield from file.iter_batches(batch_size=n_rows, columns=columns)

    def verify(self) -> None:
        """Read every byte and compare checksums.

        Raises:
            ArtefactError: naming every file that differs.
        """
        damage = [f"{f.name}: checksum differs" for f in self.manifest.files if _sha256(self.path / f.name) != f.sha256]
        _raise_damage(self.path, damage)


def open_artefact(path: Path, kind: str) -> Artefact:
    """Open an artefact, checking manifest, files and sizes.

    Raises:
        ArtefactError: missing, of another kind or version, or damaged; all damage is named at once.
    """
    text = _read_manifest(path, kind)
    try:
        values = json.loads(text)
        files = tuple(File(**f) for f in values.pop("files"))
        manifest = Manifest(files=files, **values)
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path / MANIFEST}: not a manifest ({error}); delete {path} and run the stage again") from None
    if manifest.kind != kind:
        raise ArtefactError(f"{path}: holds {manifest.kind}, expected {kind}")
    if manifest.schema_version != SCHEMA_VERSION:
        raise ArtefactError(
            f"{path}: written with schema version {manifest.schema_version}, this code reads {SCHEMA_VERSION}; "
            "run the stage again, or use the version of ommatid that wrote it"
        )
    _raise_damage(path, [problem for f in files if (problem := _problem(path / f.name, f.bytes))])
    return Artefact(path, manifest, hashlib.sha256(text).hexdigest())


class Draft:
    """An artefact in the making: a directory of its own, kept when the process dies, continued when it runs again."""

    def __init__(self, path: Path, kind: str, params: Mapping[str, Any], inputs: Mapping[str, Artefact]):
        self.path = path
        self.kind = kind
        self._params = dict(params)
        self._inputs = {name: artefact.digest for name, artefact in inputs.items()}
        (path / SCRATCH).mkdir(parents=True, exist_ok=True)
        for leftover in [*path.glob("*.tmp"), *(path / SCRATCH).glob("*.tmp")]:
            leftover.unlink()

    @property
    def scratch(self) -> Path:
        """Folder for chunks and checkpoints; removed when the artefact is sealed."""
        return self.path / SCRATCH

    def has(self, name: str) -> bool:
        """Whether this file was finished, now or by a run that died."""
        return (self.path / name).exists()

    def write_table(self, name: str, table: pa.Table, **parquet_options: Any) -> None:
        """Write one Parquet file, whole or not at all; `name` is `<table>.parquet` or made by `part_name`."""
        with self.write_file(name) as path:
            pq.write_table(table, path, **parquet_options)

    @contextmanager
    def write_file(self, name: str) -> Iterator[Path]:
        """A path to write to; when the block ends without an error the file is synced and gets its name."""
        path = self.path / name
        aside = path.with_name(path.name + ".tmp")
        try:
            yield aside
            sync(aside)
        except BaseException as error:
            aside.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ArtefactError(self._full(path)) from error
            raise
        os.replace(aside, path)

    def _full(self, path: Path) -> str:
        free = shutil.disk_usage(self.path).free
        return f"{path}: the disk is full ({free / 1e6:.0f} MB free); make room and run the stage again: what is finished is kept"

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, whole or not at all."""
        with self.write_file(name) as path:
            path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def sealed(self) -> Artefact | None:
        """The artefact, if the manifest is written already: the process died before publishing."""
        return open_artefact(self.path, self.kind) if self.has(MANIFEST) else None

    def seal(self, summary: Mapping[str, Any]) -> Artefact:
        """Write the manifest over all files and drop the scratch folder."""
        if self.scratch.exists():
            shutil.rmtree(self.scratch)
        files = tuple(_describe(path) for path in sorted(self.path.iterdir()) if path.name != MANIFEST)
        manifest = Manifest(self.kind, SCHEMA_VERSION, self._params, self._inputs, files, _versions(), dict(summary))
        self.write_json(MANIFEST, asdict(manifest))
        sync(self.path)
        return open_artefact(self.path, self.kind)

    def discard(self) -> None:
        """Remove the draft: its gate failed, so nothing of it may be continued."""
        shutil.rmtree(self.path)

    def publish(self, place: Path) -> Artefact:
        """Move the sealed draft to `place`, replacing what was there."""
        assert self.has(MANIFEST), f"{self.path} is not sealed"
        old = self.path.with_name(self.path.name + ".old")
        if old.exists():
            shutil.rmtree(old)
        if place.exists():
            os.rename(place, old)
        os.rename(self.path, place)
        sync(place.parent)
        if old.exists():
            shutil.rmtree(old)
        return open_artefact(place, self.kind)


@contextmanager
def open_draft(place: Path, kind: str, params: Mapping[str, Any], inputs: Mapping[str, Artefact]) -> Iterator[Draft]:
    """The draft of the artefact that will be at `place`, locked; drafts made by other params, inputs or code are removed.

    Raises:
        ArtefactError: another process is making the same artefact.
    """
    work = place.parent / ".work"
    work.mkdir(parents=True, exist_ok=True)
    key = _key(kind, params, inputs)
    lock = filelock.FileLock(work / f"{place.name}.lock", timeout=0)
    try:
        with lock:
            for other in work.glob(f"{place.name}-*"):
                if other.name != f"{place.name}-{key}":
                    shutil.rmtree(other)
            yield Draft(work / f"{place.name}-{key}", kind, params, inputs)
    except filelock.Timeout:
        raise ArtefactError(f"{place}: another process is making it now; wait for it to end") from None


def read_part(path: Path, columns: list[str] | None = None) -> pa.Table:
    """One Parquet file, or some of its columns, in memory."""
    with pq.ParquetFile(path) as file:
        return file.read(columns)


def part_name(table: str, index: int) -> str:
    """File name of a table's part: `train-00003.parquet`."""
    return f"{table}-{index:05d}.parquet"


def _table_of(name: str) -> str:
    stem = name.removesuffix(".parquet")
    head, dash, tail = stem.rpartition("-")
    return head if dash and tail.isdigit() else stem


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


def _describe(path: Path) -> File:
    rows = pq.read_metadata(path).num_rows if path.suffix == ".parquet" else None
    return File(path.name, path.stat().st_size, _sha256(path), rows)


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


def _read_manifest(path: Path, kind: str) -> bytes:
    try:
        return (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        stage = _MADE_BY[kind]
        what = "has no manifest.json, so it is not whole" if path.exists() else "does not exist"
        raise ArtefactError(f"{path}: {what}; make it with `dvc repro {stage}` (or `ommatid {stage}`)") from None


_MADE_BY = {"images": "images", "activations": "extract", "sae": "train", "evaluation": "evaluate", "labels": "label", "catalog": "catalog"}


def _problem(path: Path, size: int) -> str | None:
    if not path.exists():
        return f"{path.name}: missing"
    found = path.stat().st_size
    return None if found == size else f"{path.name}: {found} bytes, the manifest says {size}"


def _raise_damage(path: Path, damage: list[str]) -> None:
    if damage:
        raise ArtefactError(
            f"{path}: damaged ({len(damage)}): {'; '.join(damage)}; "
            "bring it back with `dvc checkout`, or delete the folder and run `dvc repro`"
        )
