"""Manifests: descriptions of artefacts, with the size and checksum of each file and the params and inputs that they were made from."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ommatid.errors import ArtefactError
from ommatid.schemas import SCHEMA_VERSION
from ommatid.store.filesystem import Folder
from ommatid.store.sums import checksums

MANIFEST = "manifest.json"
INSIDE = {
    "extraction": "activations",
    "training": "sae",
    "evaluations": "evaluation",
    "labellings": "labels",
    "interventions": "effects",
}
"""Kind of the inner artefacts, one for each hookpoint or SAE, by the kind of the outer artefact."""


@dataclass(frozen=True, slots=True)
class File:
    """One file of an artefact, as its manifest lists it."""

    name: str
    """File name inside the artefact. `<child>/manifest.json` represents a whole child."""
    bytes: int
    """Size in bytes."""
    sha256: str
    """sha256 of the content, in hex digits."""
    rows: int | None
    """Number of rows if it is a Parquet file, else None."""
    blocks: str
    """CRC-32 of each block of `BLOCK` bytes, in `DIGITS` hex digits each, with which blocks are compared when they are read."""


@dataclass(frozen=True)
class Manifest:
    """The content of an artefact's manifest.json."""

    kind: str
    """Kind of artefact: images, catalog, or a kind among the keys and values of `INSIDE`."""
    schema_version: int
    """`schemas.SCHEMA_VERSION` of the code that wrote it."""
    params: dict[str, Any]
    """The section of Params that it was made with, without the keys that do not affect the result."""
    inputs: dict[str, str]
    """sha256 of the manifest of each input artefact, by name."""
    files: tuple[File, ...]
    """All files, in order of name."""
    versions: dict[str, str]
    """Versions of Python, Ommatid and the libraries that affect results."""
    summary: dict[str, Any]
    """Statistics that the quality gate and later stages read."""

    def iter_json(self) -> Iterator[bytes]:
        """Yield the text of manifest.json in pieces, one per file, because there may be millions. It ends with its own checksum."""
        digest = hashlib.sha256()
        for piece in self._iter_content():
            digest.update(piece)
            yield piece
        yield _TAIL % digest.hexdigest().encode()

    def _iter_content(self) -> Iterator[bytes]:
        values = {name: getattr(self, name) for name in ("kind", "schema_version", "params", "inputs", "versions", "summary")}
        yield json.dumps(values, indent=2, sort_keys=True).removesuffix("\n}").encode() + b',\n  "files": ['
        for i, file in enumerate(self.files):
            line = json.dumps({name: getattr(file, name) for name in sorted(_FILE_KEYS)})
            yield f"{',' if i else ''}\n    {line}".encode()
        yield b"\n  ]"

    @classmethod
    def from_json(cls, text: bytes) -> "Manifest":
        """Parse the text of manifest.json.

        Returns:
            The manifest.

        Raises:
            ValueError, KeyError, TypeError: The text is not a manifest, or was changed after it was written.
            ArtefactError: The manifest has another schema version.
        """
        if (tail := _TAIL_PATTERN.search(text, max(0, len(text) - _TAIL_BYTES))) and not _is_sum_of(tail, text):
            raise ValueError("its checksum differs")
        values = json.loads(text, object_hook=lambda found: File(**found) if found.keys() == _FILE_KEYS else found)
        version = values["schema_version"]
        if version != SCHEMA_VERSION:
            raise ArtefactError(
                f"written with schema version {version}, but this code reads {SCHEMA_VERSION}; "
                "run the stage again, or use the version of ommatid that wrote it"
            )
        if tail is None:
            raise ValueError("it does not end with its checksum")
        del values[_CHECKSUM]
        files = tuple(values.pop("files"))
        if not all(isinstance(file, File) for file in files):
            raise ValueError("a file lacks its name, bytes, sha256, rows or blocks")
        return cls(files=files, **values)


_FILE_KEYS = frozenset(("name", "bytes", "sha256", "rows", "blocks"))
_CHECKSUM = "checksum"
_TAIL = b',\n  "checksum": "%s"\n}\n'
_TAIL_PATTERN = re.compile(re.escape(_TAIL).replace(b"%s", b"([0-9a-f]{64})") + rb"\Z")
_TAIL_BYTES = len(_TAIL % (64 * b"0"))


def _is_sum_of(tail: re.Match[bytes], text: bytes) -> bool:
    return hashlib.sha256(memoryview(text)[: tail.start()]).hexdigest().encode() == tail[1]


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
    "interventions": "intervene",
    "effects": "intervene",
    "catalog": "catalog",
    "drift_reference": "images",
    "drift": "drift",
}


def read_manifest(folder: Folder, kind: str) -> bytes:
    """Read the text of an artefact's manifest.

    Args:
        folder: Folder of the artefact.
        kind: Kind of artefact expected there.

    Returns:
        The bytes of manifest.json.

    Raises:
        ArtefactError: The folder or its manifest is missing. The message names the command that makes the artefact.
    """
    try:
        return folder.read_bytes(MANIFEST)
    except FileNotFoundError:
        stage = _MADE_BY[kind]
        what = "has no manifest.json, so it is incomplete" if folder.exists() else "does not exist"
        dvc = f"`dvc repro {stage}` (or `ommatid {stage}`)"
        todo = dvc if folder.is_local else f"`ommatid {stage} --data {folder.parent}`"
        raise ArtefactError(f"{folder}: {what}; make it with {todo}") from None


def parse(folder: Folder, text: bytes) -> Manifest:
    """Parse the text of a folder's manifest.

    Returns:
        The manifest.

    Raises:
        ArtefactError: The text is not a manifest, is damaged, or has another schema version.
    """
    try:
        return Manifest.from_json(text)
    except ArtefactError as error:
        raise ArtefactError(f"{folder}: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(
            f"{folder / MANIFEST}: damaged, or not a manifest ({error}); bring it back with `dvc checkout`, or delete {folder} and run the "
            "stage again"
        ) from None


def part_name(table: str, index: int) -> str:
    """Return the file name of a table's part, such as `train-00003.parquet`."""
    return f"{table}-{index:05d}.parquet"


def describe(path: Path) -> File:
    """Describe a file on this machine under its own name."""
    return describe_path(path, path.name)


def describe_path(path: Path, name: str) -> File:
    """Describe a file on this machine under the name that it will have in the artefact."""
    rows = pq.read_metadata(path).num_rows if name.endswith(".parquet") else None
    with path.open("rb") as file:
        sha256, blocks = checksums(file)
    return File(name, path.stat().st_size, sha256, rows, blocks)


def describe_in(folder: Folder, name: str) -> File:
    """Describe a file of a folder, which may be behind a URL."""
    size = folder.size(name)
    assert size is not None, f"{folder}: has no {name}"
    rows = None
    if name.endswith(".parquet"):
        with folder.open(name, size) as file:
            rows = pq.read_metadata(file).num_rows
    with folder.open(name, size) as file:
        sha256, blocks = checksums(file)
    return File(name, size, sha256, rows, blocks)


def table_of(name: str) -> str:
    """Return the name of the table that a Parquet file is a part of."""
    stem = name.removesuffix(".parquet")
    head, dash, tail = stem.rpartition("-")
    return head if dash and tail.isdigit() else stem


def child_of(name: str) -> str | None:
    """Return the name of the child that has this manifest, or None if the file is not the manifest of a child."""
    return name.removesuffix(f"/{MANIFEST}") if name.endswith(f"/{MANIFEST}") else None
