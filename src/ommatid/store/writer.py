"""Files of a draft, written whole or not at all."""

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
from ommatid.store.filesystem import Folder, aside_of, open_folder, writing
from ommatid.store.manifest import File, describe_in, describe_path
from ommatid.store.workspace import OPEN, RECEIPTS, SCRATCH, here_of, remove_old_scratch


class Writer:
    """Where the files of a draft are written, each whole or not at all; many processes may hold one.

    Two that write the same file do not harm one another: each writes aside under a name of its own, and the last one's stays.
    """

    def __init__(self, folder: Folder, here: Path):
        self.folder = folder
        self._top = folder
        self._here = here
        self._described: dict[str, File] = {}

    @staticmethod
    def attach(url: str) -> "Writer":
        """A worker process's hold on a draft that the driver has open: it writes files, and neither locks nor cleans.

        Raises:
            ArtefactError: there is no such draft.
        """
        folder = open_folder(url)
        if not folder.is_made(OPEN):
            raise ArtefactError(f"{url}: there is no draft here to write to; its run has ended, or this machine does not see its folder")
        here = here_of(folder)
        if not folder.is_local:
            with writing(here):
                remove_old_scratch(here)
                (here / SCRATCH).mkdir(parents=True, exist_ok=True)
        return Writer(folder, here)

    @property
    def url(self) -> str:
        """What `Writer.attach` takes in another process."""
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
        return open_folder(self._here) if name.startswith(f"{SCRATCH}/") else self.folder

    def has(self, name: str) -> bool:
        """Whether this file was finished, now or by a run that died. For many files ask `names` once."""
        return self._home(name).size(name) is not None

    def names(self, inside: str = "") -> list[str]:
        """Finished files of the draft, or of a folder in it, in order, by one listing."""
        return sorted(f"{inside}/{name}" if inside else name for name in self._home(f"{inside}/").sizes(inside) if name != OPEN)

    def read(self, name: str, filters: list[tuple[str, str, Any]] | None = None, columns: list[str] | None = None) -> pa.Table:
        """A finished Parquet file, or its rows that pass `filters`, or some of its columns."""
        home = self._home(name)
        no_partitions: Any = None  # folders named a=b are not columns
        with self._still_mine():
            source = home.local_path(name) or home.open(name)
            return pq.read_table(source, columns=columns, filters=filters, partitioning=no_partitions)

    def read_json(self, name: str) -> Any:
        """What a finished JSON file holds.

        Raises:
            ArtefactError: it is damaged.
        """
        with self._still_mine():
            return _value_of(self._home(name).read_bytes(name), f"{self.url}/{name}")

    def iter_json(self, names: Sequence[str]) -> Iterator[Any]:
        """What many finished JSON files hold, in order; from an object store many are read at a time.

        Raises:
            ArtefactError: one is damaged.
        """
        with self._still_mine():
            for name, text in zip(names, self.folder.iter_bytes(names), strict=True):
                yield _value_of(text, f"{self.url}/{name}")

    @contextmanager
    def _still_mine(self) -> Iterator[None]:
        """A file that is not there is looked for no further where another machine took the whole draft."""
        try:
            yield
        except FileNotFoundError:
            self._check_open()
            raise

    def _check_open(self) -> None:
        if not self._top.is_local and not self._top.is_made(OPEN):
            raise ArtefactError(
                f"{self._top}: this draft was published or removed by another machine, which makes the same one or one with other params; "
                "make an artefact on one machine at a time; run the stage again if it is not there now"
            )

    def local(self, name: str) -> Path:
        """A finished file on this machine; an object is copied to the scratch folder, once."""
        home = self._home(name)
        if path := home.local_path(name):
            return path
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
        path = home.local_path(name) or self.scratch / name.replace("/", "-")
        aside = aside_of(path)
        with writing(path):
            if "/" in name and home.is_local:
                path.parent.mkdir(exist_ok=True)
            try:
                yield aside
                described = None if name.startswith((f"{SCRATCH}/", f"{RECEIPTS}/")) else describe_path(aside, name)
                if home.is_local:
                    self._note(path, aside)
                home.put(aside, name)
            except BaseException:
                aside.unlink(missing_ok=True)
                raise
        if described:
            self._described[name] = described
            trust(home, described)

    def _note(self, path: Path, source: Path) -> None:
        """Remember what a file will hold, where no receipt tells it."""

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file for `read_json`, with a checksum of the value, whole or not at all."""
        text = json.dumps(value, indent=2, sort_keys=True)
        with self.write_file(name) as path:
            path.write_text(f'{{"checksum": "{_sum_of(value)}", "value": {text}}}\n', encoding="utf-8")

    def describe(self, name: str) -> File:
        """Size, checksum and rows of a finished file; what this process wrote is not read again."""
        if name not in self._described:
            self._described[name] = describe_in(self.folder, name)
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
