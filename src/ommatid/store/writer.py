"""The writer of a draft's files, which appear only once they are complete."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ommatid.errors import ArtefactError
from ommatid.store.damage import trust
from ommatid.store.filesystem import Folder, open_folder, temporary_path, writing
from ommatid.store.manifest import File, describe_in, describe_path
from ommatid.store.workspace import OPEN, RECEIPTS, SCRATCH, local_folder_of, remove_old_scratch


class Writer:
    """Writes and reads the files of a draft. No file appears before it is complete, and many processes may write to the same draft.

    Two processes may write the same file: each writes under a temporary name of its own, and the file of the last to finish remains.
    """

    def __init__(self, folder: Folder, local: Path):
        self.folder = folder
        self._top = folder
        self._local = local
        self._described: dict[str, File] = {}

    @staticmethod
    def attach(url: str) -> "Writer":
        """Return a writer for a worker, for a draft that the driver has open. It neither locks the draft nor cleans up.

        Raises:
            ArtefactError: There is no such draft.
        """
        folder = open_folder(url)
        if not folder.is_made(OPEN):
            raise ArtefactError(f"{url}: there is no draft here to write to; its run has ended, or this machine cannot see its folder")
        local = local_folder_of(folder)
        if not folder.is_local:
            with writing(local):
                remove_old_scratch(local)
                (local / SCRATCH).mkdir(parents=True, exist_ok=True)
        return Writer(folder, local)

    @property
    def url(self) -> str:
        """Path or URL from which `Writer.attach` opens the draft in another process."""
        return self.folder.url

    @property
    def path(self) -> Path:
        """The draft's folder on this machine. It holds `scratch`, and the finished files too if the draft is on a disk."""
        return self._local

    @property
    def scratch(self) -> Path:
        """Folder on this machine for chunks and checkpoints, which is removed when the artefact is sealed."""
        return self._local / SCRATCH

    def _home(self, name: str) -> Folder:
        """Return the folder that holds a file. Scratch files are always on this machine."""
        return open_folder(self._local) if name.startswith(f"{SCRATCH}/") else self.folder

    def has(self, name: str) -> bool:
        """Return whether a file was finished, by this run or by one that died. For many files, one call of `names` is faster."""
        return self._home(name).size(name) is not None

    def names(self, inside: str = "") -> list[str]:
        """Return the names of the finished files of the draft, or of a subfolder, in order. This takes one listing."""
        return sorted(f"{inside}/{name}" if inside else name for name in self._home(f"{inside}/").sizes(inside) if name != OPEN)

    def read(self, name: str, filters: list[tuple[str, str, Any]] | None = None, columns: list[str] | None = None) -> pa.Table:
        """Read a finished Parquet file, or the rows that pass `filters`, or some of its columns."""
        home = self._home(name)
        no_partitions: Any = None  # By default, pyarrow takes a folder named a=b for a column.
        with self._explaining_removal():
            source = home.local_path(name) or home.open(name)
            return pq.read_table(source, columns=columns, filters=filters, partitioning=no_partitions, use_threads=False)

    def read_json(self, name: str) -> Any:
        """Return the value in a finished JSON file.

        Raises:
            ArtefactError: The file is damaged.
        """
        with self._explaining_removal():
            return _value_of(self._home(name).read_bytes(name), f"{self.url}/{name}")

    def iter_json(self, names: Sequence[str]) -> Iterator[Any]:
        """Yield the values in many finished JSON files, in order. From an object store, many files are read at a time.

        Raises:
            ArtefactError: A file is damaged.
        """
        with self._explaining_removal():
            for name, text in zip(names, self.folder.iter_bytes(names), strict=True):
                yield _value_of(text, f"{self.url}/{name}")

    @contextmanager
    def _explaining_removal(self) -> Iterator[None]:
        """Raise an error that says so if a file is missing because another machine published or removed the draft."""
        try:
            yield
        except FileNotFoundError:
            self._check_open()
            raise

    def _check_open(self) -> None:
        if not self._top.is_local and not self._top.is_made(OPEN):
            raise ArtefactError(
                f"{self._top}: this draft was published or removed by another machine that makes the same artefact, perhaps with "
                "other params; make an artefact on one machine at a time; run the stage again if it is not there now"
            )

    def local(self, name: str) -> Path:
        """Return the local path of a finished file. An object is copied to the scratch folder once."""
        home = self._home(name)
        if path := home.local_path(name):
            return path
        path = self.scratch / "fetched" / self.folder.name / name  # Children share the scratch folder.
        if not path.exists():
            home.fetch(name, path)
        return path

    def write_table(self, name: str, table: pa.Table, **parquet_options: Any) -> File:
        """Write a Parquet file and return its description. `name` is `<table>.parquet`, or comes from `part_name`."""
        with self.write_file(name) as path:
            pq.write_table(table, path, **parquet_options)
        return self.describe(name)

    @contextmanager
    def write_file(self, name: str) -> Iterator[Path]:
        """Yield a temporary path to write to. When the block ends without an error, the file is synced and renamed to `name`.

        Raises:
            ArtefactError: The disk is full or cannot be written, or the store cannot be reached.
        """
        home = self._home(name)
        path = home.local_path(name) or self.scratch / name.replace("/", "-")
        temporary = temporary_path(path)
        with writing(path):
            if "/" in name and home.is_local:
                path.parent.mkdir(exist_ok=True)
            try:
                yield temporary
                described = None if name.startswith((f"{SCRATCH}/", f"{RECEIPTS}/")) else describe_path(temporary, name)
                if home.is_local:
                    self._note(path, temporary)
                home.put(temporary, name)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        if described:
            self._described[name] = described
            trust(home, described)

    def _note(self, path: Path, source: Path) -> None:
        """Write the note of a file that is about to be renamed. Only the driver's `Draft` does; receipts describe the files of workers."""

    def write_json(self, name: str, value: Any) -> None:
        """Write a value and its checksum to a JSON file, which `read_json` reads."""
        text = json.dumps(value, indent=2, sort_keys=True)
        with self.write_file(name) as path:
            path.write_text(f'{{"checksum": "{_sum_of(value)}", "value": {text}}}\n', encoding="utf-8")

    def describe(self, name: str) -> File:
        """Return the description of a finished file. Files that this process wrote are not read again."""
        if name not in self._described:
            self._described[name] = describe_in(self.folder, name)
        return self._described[name]

    def share(self, name: str, to: str) -> File:
        """Give a finished file a second name, such as `b/embeddings-00000.parquet`, without a second copy, and return its description."""
        with writing(self._local / to):
            self.folder.share(name, to)
        self._described[to] = replace(self.describe(name), name=to)
        return self._described[to]

    def remove(self, name: str) -> None:
        """Remove a finished file, or a folder with everything in it."""
        self._home(name).remove(name)
        self._described = {path: file for path, file in self._described.items() if path != name and not path.startswith(f"{name}/")}

    def __reduce__(self) -> tuple[Callable[[str], "Writer"], tuple[str]]:
        return Writer.attach, (self.url,)


def _sum_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _value_of(text: bytes, where: str) -> Any:
    try:
        found = json.loads(text)
        if found["checksum"] == _sum_of(found["value"]):
            return found["value"]
    except (ValueError, KeyError, TypeError):
        pass
    raise ArtefactError(f"{where}: damaged: its checksum differs; delete this draft and run the stage again")
