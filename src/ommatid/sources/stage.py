"""What params.yaml names by path, as DVC depends on it: a fingerprint of the files' content, for each stage that reads some.

DVC's own walk of a folder differs from ours: it does not follow linked folders, waits for pipes, and fails at links that lead nowhere and
at names that are not UTF-8. So dvc.yaml has the stage `sources`, which always runs: it writes what it finds into small files, on which
the other stages depend. The same content gives the same bytes on every machine; sizes and times only spare reading what was read before.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, assert_never

from ommatid.config import Cifar10Source, ExtractFiles, FolderSource, ImageSource, Params, ParquetSource, ShapesSource
from ommatid.store.filesystem import READ_BYTES, aside_of, cache_folder
from ommatid.store.filesystem.listing import Listed, Listing, list_activations, list_any, list_images, list_parquet

PLACE = Path("data/sources")
"""Folder of the files that DVC depends on."""
STAGES = ("images", "extract", "train", "label")
"""Stages that read what their section names by path; there is a file for each."""
SETTLED_NS = 2 * 10**9
"""A file that changed less than this ago may change again and show the same times: it is not remembered."""
_N_READERS = 8

Found = dict[str, dict[str, Any]]
"""Key of params, and the path where it names several, to number, bytes and checksum of the files there."""


def write_sources(params: Params, place: Path = PLACE) -> dict[str, Found]:
    """Look at everything that params name by path, write down what was found, and give it by stage.

    Images, and activations from files, must be there. Of the rest, what is not there is left out: it may be a name on a model hub, and
    the stage that needs it says so.

    Raises:
        SourceError: the images, or the files of activations, are not there or cannot be listed.
        ArtefactError: a URL that cannot be reached.
    """
    found = {stage: _look(stage, params) for stage in STAGES}
    place.mkdir(parents=True, exist_ok=True)
    for stage, values in found.items():
        _replace(place / f"{stage}.json", json.dumps(values, indent=1, sort_keys=True) + "\n")
    return found


def _look(stage: str, params: Params) -> Found:
    from_files = isinstance(params.extract, ExtractFiles)
    if stage == "images":  # which nobody reads where activations come from files
        return {} if from_files else {"images.source.path": fingerprint(_list_source(params.images.source))}
    if stage == "extract" and isinstance(params.extract, ExtractFiles):
        return {"extract.path": fingerprint(list_activations(params.extract.path))}
    named = _paths(stage, getattr(params, stage).model_dump(mode="json"))
    return {key: fingerprint(list_any(path, key)) for key, path in named if path.exists()}


def _list_source(source: ImageSource) -> Listing:
    match source:
        case FolderSource():
            return list_images(source.path)
        case ParquetSource():
            return list_parquet(source.path)
        case Cifar10Source() | ShapesSource():
            return list_any(source.path, "images.source.path")
        case _:
            assert_never(source)


def _paths(key: str, value: Any) -> Iterator[tuple[str, Path]]:
    """Key and path of whatever in a section may be a file or folder, by the names that fields of this kind have."""
    if isinstance(value, Mapping):
        for name, inside in value.items():
            yield from _paths(f"{key}.{name}", inside)
    elif isinstance(value, list):
        for i, inside in enumerate(value):
            yield from _paths(f"{key}.{i}", inside)
    elif isinstance(value, str):
        field = next(name for name in reversed(key.split(".")) if not name.isdigit())
        if field in ("path", "words"):
            yield key, Path(value).expanduser()
        elif field == "factory":  # package.module:function
            yield key, Path(value.partition(":")[0].replace(".", "/") + ".py")


def fingerprint(listing: Listing) -> dict[str, Any]:
    """Number, bytes and checksum of some files; the checksum is of their names and contents."""
    whole = hashlib.sha256()
    for file, checksum in zip(listing.files, _checksums(listing), strict=True):
        whole.update(f"{file.name}\0{checksum}\n".encode())
    return {"n_files": len(listing.files), "bytes": sum(file.size for file in listing.files), "sha256": whole.hexdigest()}


def _checksums(listing: Listing) -> list[str]:
    """The checksum of each file: the one remembered where size and times are as they were, else by reading it."""
    if listing.files[0].path is None:
        return [f"{file.size} {file.stamp}" for file in listing.files]  # the store's own checksum
    memory = cache_folder() / "checksums" / f"{hashlib.sha256(listing.place.encode()).hexdigest()[:32]}.json"
    known = _load(memory)
    missing = [file for file in listing.files if not file.stamp or known.get(file.inside, ("", ""))[0] != _facts(file)]
    with ThreadPoolExecutor(_N_READERS) as pool:
        read = dict(zip((file.inside for file in missing), pool.map(_checksum, missing), strict=True))
    found = [read[file.inside] if file.inside in read else known[file.inside][1] for file in listing.files]
    if missing or len(known) != len(found):
        now = time.time_ns()
        settled = {
            file.inside: (_facts(file), checksum)
            for file, checksum in zip(listing.files, found, strict=True)
            if file.stamp and now - max(map(int, file.stamp.split())) > SETTLED_NS
        }
        with suppress(OSError):  # without a memory everything is read again: slow, not wrong
            memory.parent.mkdir(parents=True, exist_ok=True)
            _replace(memory, json.dumps(settled))
    return found


def _facts(file: Listed) -> str:
    return f"{file.size} {file.stamp}"


def _checksum(file: Listed) -> str:
    digest = hashlib.sha256()
    try:
        with file.folder.open(file.inside) as opened:
            while block := opened.read(READ_BYTES):
                digest.update(block)
    except OSError as error:
        return f"cannot be read: {os.strerror(error.errno) if error.errno else type(error).__name__}"
    return digest.hexdigest()


def _load(memory: Path) -> dict[str, tuple[str, str]]:
    try:
        return {name: (facts, checksum) for name, (facts, checksum) in json.loads(memory.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _replace(path: Path, text: str) -> None:
    aside = aside_of(path)
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
