"""Chunks of a shard wait on the local disk until all are there: then its rows are put in their final order."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from ommatid.folder import sync, writing
from ommatid.store.sums import block_sums


class Spill:
    """The folder of one shard's chunks. A chunk is there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._sound: set[Path] = set()
        """Chunks that this process has found to be what was written."""
        folder.mkdir(parents=True, exist_ok=True)

    def has(self, chunk: int) -> bool:
        """Whether this chunk was finished, now or by a run that died; one that was damaged since is removed, to be made again."""
        path = self._path(chunk)
        if path not in self._sound and path.exists():
            if _facts(path) == _noted(path):
                self._sound.add(path)
            else:
                shutil.rmtree(path)
        return path.exists()

    def write(self, chunk: int, tables: Mapping[str, list[pa.RecordBatch]]) -> None:
        """Write a chunk: batches of one schema under each name.

        Raises:
            ArtefactError: the disk is full, or may not be written to.
        """
        with writing(self._path(chunk)):
            self._write(chunk, tables)

    def _write(self, chunk: int, tables: Mapping[str, list[pa.RecordBatch]]) -> None:
        aside = self.folder / f"{chunk:05d}.{os.getpid()}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for name, batches in tables.items():
            with pa.ipc.new_file(str(aside / f"{name}.arrow"), batches[0].schema) as file:
                for batch in batches:
                    file.write_batch(batch)
            sync(aside / f"{name}.arrow")
        (aside / _NOTE).write_text(json.dumps(_facts(aside)), encoding="utf-8")
        sync(aside / _NOTE)
        if not self.has(chunk):
            aside.rename(self._path(chunk))

    def read(self, chunk: int, name: str, index: int = 0) -> pa.RecordBatch:
        """One of the batches under a name."""
        # read, not mapped: mapped pages would count as this process's memory
        with pa.OSFile(str(self._path(chunk) / f"{name}.arrow")) as file:
            return pa.ipc.open_file(file).get_batch(index)

    def drop(self) -> None:
        """Remove all chunks."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:05d}"


_NOTE = "checksums.json"
"""File of a chunk that tells what the others hold."""


def _facts(chunk: Path) -> dict[str, str]:
    """Checksums of the files of a chunk."""
    found = {}
    for path in chunk.glob("*.arrow"):
        with path.open("rb") as file:
            found[path.name] = block_sums(file)
    return found


def _noted(chunk: Path) -> Any:
    try:
        return json.loads((chunk / _NOTE).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
