"""Finished artefacts, opened for reading."""

import functools
import hashlib
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ommatid.errors import ArtefactError
from ommatid.store.damage import Checked, is_whole, raise_damage, size_damage
from ommatid.store.filesystem import READ_BYTES, Folder, is_temporary, open_folder
from ommatid.store.manifest import INSIDE, MANIFEST, File, Manifest, child_of, parse, read_manifest, table_of

CACHE = Path("data/.cache")
"""Folder of local copies of objects, by the digest of their artefact's manifest. It may be deleted at any time."""


class _Part(pq.ParquetFile):
    """A Parquet file that is decoded in the calling thread alone.

    Arrow's own threads may still hold a buffer when a read has returned. To release one of a Python file they need the interpreter, and a
    process that ends at that moment aborts ("terminate called without an active exception", pyarrow 25). One thread is as fast here. Only
    reading ahead from an object store still uses Arrow's threads.
    """

    def read(self, *args: Any, **kwargs: Any) -> pa.Table:
        return super().read(*args, **{"use_threads": False, **kwargs})

    def read_row_group(self, *args: Any, **kwargs: Any) -> pa.Table:
        return super().read_row_group(*args, **{"use_threads": False, **kwargs})

    def iter_batches(self, *args: Any, **kwargs: Any) -> Iterator[pa.RecordBatch]:
        return super().iter_batches(*args, **{"use_threads": False, **kwargs})


class Artefact:
    """A finished artefact, opened read-only."""

    def __init__(self, folder: Folder, manifest: Manifest, digest: str):
        self.folder = folder
        self.manifest = manifest
        self.digest = digest
        """sha256 of manifest.json, which identifies the whole content."""
        self._left_out = frozenset(self.rejected)
        self._footers: dict[str, pq.FileMetaData] = {}

    @property
    def url(self) -> str:
        """Path or URL at which `open_artefact` finds it."""
        return self.folder.url

    @property
    def path(self) -> Path:
        """Folder on this machine with all files, after checking them. Objects are copied to `CACHE`.

        This suits small artefacts. For one file of a large artefact, use `file`.

        Raises:
            ArtefactError: A file is not what the manifest says.
        """
        for file in self.manifest.files:
            self.file(file.name)
        return self.folder.local_path() or self._cache

    def file(self, name: str) -> Path:
        """Return the local path of one file after checking all of it. An object is copied to `CACHE` once.

        Raises:
            ArtefactError: The file is not what the manifest says.
        """
        listed = self._by_name[name]
        if path := self.folder.local_path(name):
            with Checked(self.folder, listed) as file:
                file.check()
            return path
        copy = self._cache / name
        if not is_whole(open_folder(self._cache), listed):
            self.folder.fetch(name, copy, listed.sha256)
        return copy

    def local(self, name: str) -> Path | None:
        """Return the path of a file if it is on a disk of this machine, else None. Callers check the file with `check_chunk`."""
        return self.folder.local_path(name)

    def check_chunk(self, name: str, metadata: pq.FileMetaData, row_group: int, column: int) -> None:
        """Check the bytes of one column in one row group of a part.

        Args:
            name: File name of the part.
            metadata: Its Parquet footer.
            row_group: Index of the row group.
            column: Index of the column.

        Raises:
            ArtefactError: The bytes are not what the manifest says.
        """
        with Checked(self.folder, self._by_name[name]) as file:
            file.check(*_extent(metadata.row_group(row_group).column(column)))

    @property
    def _cache(self) -> Path:
        return CACHE / f"{self.folder.name}-{self.digest[:16]}"

    @property
    def summary(self) -> dict[str, Any]:
        """Statistics that the stage wrote into the manifest."""
        return self.manifest.summary

    @property
    def rejected(self) -> Mapping[str, str]:
        """Reasons why the gate rejected some inner artefacts while others passed, by name. `children` leaves these out."""
        return self.summary.get("rejected", {}) if self.manifest.kind in INSIDE else {}

    def leaving_out(self, names: Iterable[str]) -> "Artefact":
        """Return the same artefact, except that its `children` leave out these names instead of those that the gate rejected."""
        view = Artefact(self.folder, self.manifest, self.digest)
        view._left_out = frozenset(names)
        return view

    @functools.cached_property
    def _by_name(self) -> dict[str, File]:
        return {file.name: file for file in self.manifest.files}

    @functools.cached_property
    def _by_table(self) -> dict[str, list[File]]:
        tables: dict[str, list[File]] = {}
        for file in self.manifest.files:
            if file.rows is not None:
                tables.setdefault(table_of(file.name), []).append(file)
        # By length first, so that part 100000 comes after 99999.
        return {table: sorted(files, key=lambda file: (len(file.name), file.name)) for table, files in sorted(tables.items())}

    def parts(self, table: str) -> list[str]:
        """Return the file names of a table in order: `<table>.parquet`, or `<table>-00000.parquet ...`.

        Raises:
            ArtefactError: There is no such table.
        """
        if table not in self._by_table:
            raise ArtefactError(f"{self.url}: has no table {table!r}; it has {', '.join(self.tables)}")
        return [file.name for file in self._by_table[table]]

    def files(self, table: str, columns: Container[str] | None = None) -> list[Path]:
        """Return the local paths of a table's files in order, after checking them. Objects are copied to `CACHE` once.

        Args:
            table: Name of the table.
            columns: Columns that will be read, to which the check of files on a disk is limited; None means all.

        Returns:
            One path per part.

        Raises:
            ArtefactError: A file is not what the manifest says, or there is no such table.
        """
        folder = self.folder.local_path()
        if columns is None or folder is None:
            return [self.file(name) for name in self.parts(table)]
        return [self._check_columns(folder, name, columns) for name in self.parts(table)]

    def _check_columns(self, folder: Path, name: str, columns: Container[str]) -> Path:
        with Checked(self.folder, self._by_name[name]) as source, _Part(source) as file:
            schema, metadata = file.schema, file.metadata
            wanted = [i for i in range(metadata.num_columns) if schema.column(i).path.partition(".")[0] in columns]
            for row_group in range(metadata.num_row_groups):
                for column in wanted:
                    source.check(*_extent(metadata.row_group(row_group).column(column)))
        return folder / name

    @property
    def tables(self) -> list[str]:
        """Names of the Parquet tables."""
        return list(self._by_table)

    def rows(self, table: str) -> int:
        """Return the number of rows of a table according to the manifest; 0 if there is no such table."""
        return sum(file.rows or 0 for file in self._by_table.get(table, ()))

    def row_groups(self, table: str) -> Iterator[list[int]]:
        """Yield, for each part of a table, the number of rows of each row group."""
        for name in self.parts(table):
            with self.open_part(name) as file:
                yield [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]

    @contextmanager
    def open_part(self, name: str) -> Iterator[pq.ParquetFile]:
        """Open one part of a table, to read some of its row groups."""
        # Reads are buffered because pyarrow otherwise holds whole row groups, which are large for encoded images.
        is_near = self.folder.is_local
        options = {"buffer_size": 2**20 if is_near else READ_BYTES, "pre_buffer": False, "metadata": self._footers.get(name)}
        with Checked(self.folder, self._by_name[name]) as source, _Part(source, **options) as file:
            if not is_near and len(self._footers) < _FOOTERS_KEPT:
                self._footers[name] = file.metadata
            yield file

    def read_part(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Read one part of a table, or some of its columns, into memory."""
        with Checked(self.folder, self._by_name[name]) as source, _Part(source, pre_buffer=not self.folder.is_local) as file:
            return file.read(columns)

    def read(self, table: str, columns: list[str] | None = None) -> pa.Table:
        """Read a whole table, or some of its columns, into memory."""
        return pa.concat_tables(list(self.iter_parts(table, columns)))

    def iter_parts(self, table: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Yield the parts of a table in order, each read when it is its turn."""
        for name in self.parts(table):
            yield self.read_part(name, columns)

    def iter_batches(self, table: str, columns: list[str] | None = None, n_rows: int = 1024) -> Iterator[pa.RecordBatch]:
        """Yield a table in order, at most `n_rows` rows at a time, which suits tables with large values."""
        for name in self.parts(table):
            with self.open_part(name) as file:
                yield from file.iter_batches(batch_size=n_rows, columns=columns)

    @property
    def children(self) -> list[str]:
        """Names of the inner artefacts, except those that the gate rejected, or those given to `leaving_out` instead."""
        return [child for file in self.manifest.files if (child := child_of(file.name)) and child not in self._left_out]

    def child(self, name: str, kind: str) -> "Artefact":
        """Open an inner artefact.

        Args:
            name: Name of the inner artefact.
            kind: Kind that it must have.

        Returns:
            The inner artefact.

        Raises:
            ArtefactError: There is no inner artefact of this name and kind, it is damaged, or it is not the one that this manifest lists.
        """
        if name not in self.children:
            why = f"; {name} was rejected: {self.rejected[name]}" if name in self.rejected else ""
            raise ArtefactError(f"{self.url}: has no {name!r} inside; it has {', '.join(self.children) or 'none'}{why}")
        child = open_artefact(self.folder / name, kind)
        listed = self._by_name[f"{name}/{MANIFEST}"]
        if child.digest != listed.sha256:
            raise_damage(self.folder, [f"{listed.name}: checksum differs"])
        return child

    def each(self) -> dict[str, "Artefact"]:
        """Open all `children`, by name.

        Returns:
            The inner artefacts.

        Raises:
            ArtefactError: An inner artefact is damaged, or is not the one that this manifest lists.
        """
        return {name: self.child(name, INSIDE[self.manifest.kind]) for name in self.children}

    def verify(self) -> None:
        """Read every byte, including those of children, and compare checksums.

        Raises:
            ArtefactError: Some files differ. The message names them.
        """
        raise_damage(self.folder, list(self._iter_damage()))

    def _iter_damage(self) -> Iterator[str]:
        for file in self.manifest.files:
            size = self.folder.size(file.name)
            if size is None:
                yield f"{file.name}: missing"
            elif size != file.bytes or self.folder.sha256(file.name, size) != file.sha256:
                yield f"{file.name}: checksum differs"
            elif child := child_of(file.name):
                folder = self.folder / child
                inside = Artefact(folder, parse(folder, folder.read_bytes(MANIFEST)), file.sha256)
                yield from (f"{child}/{damage}" for damage in inside._iter_damage())


_FOOTERS_KEPT = 1024
"""Number of Parquet footers of remote parts that an artefact keeps, so that reading scattered row groups fetches each footer once."""


def open_artefact(place: Folder | Path | str, kind: str) -> Artefact:
    """Open an artefact, checking its manifest and the presence and size of its files.

    Args:
        place: Path or URL.
        kind: Kind that the artefact must have.

    Returns:
        The artefact.

    Raises:
        ArtefactError: The artefact is missing, is damaged, in which case the message lists all damage, or has another kind or schema
            version; or the URL cannot be reached.
    """
    folder = open_folder(place)
    text = read_manifest(folder, kind)
    digest = hashlib.sha256(text).hexdigest()
    manifest = parse(folder, text)
    del text  # It takes hundreds of megabytes for a million shards.
    if manifest.kind != kind:
        raise ArtefactError(f"{folder}: holds {manifest.kind}, expected {kind}")
    raise_damage(folder, size_damage(folder, manifest.files))
    return Artefact(folder, manifest, digest)


def list_artefacts(folder: Path) -> list[Path]:
    """List the folders of the artefacts in a folder, by name; what a killed run left half-written is none."""
    return sorted(manifest.parent for manifest in folder.glob(f"*/{MANIFEST}") if not is_temporary(manifest.parent.name))


def checked_folder(path: Path, kind: str) -> Path:
    """Return a folder that the user named, after checking all of it if it is an artefact.

    Args:
        path: The folder.
        kind: Kind that an artefact there must have.

    Returns:
        The folder.

    Raises:
        ArtefactError: The folder is an artefact that is damaged or of another kind.
    """
    return open_artefact(path, kind).path if (path / MANIFEST).exists() else path


def _extent(chunk: pq.ColumnChunkMetaData) -> tuple[int, int]:
    """Return where the bytes of a column chunk begin and end."""
    pages = [chunk.data_page_offset, *([chunk.dictionary_page_offset] if chunk.has_dictionary_page else [])]
    start = min(pages)
    return start, start + chunk.total_compressed_size


def read_part(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet file, or some of its columns, into memory."""
    with pq.ParquetFile(path) as file:
        return file.read(columns)
