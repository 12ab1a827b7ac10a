"""Stage `sources`: writes what a stage depends on besides artefacts, so that DVC runs it again when one of these changes.

These are the files that params.yaml names, and the code that the stage uses under the present params. DVC's own listing of a folder
differs from Ommatid's: it does not follow linked folders, blocks on pipes, and fails on dangling links and on names that are not UTF-8;
and it cannot tell code that a stage uses from code beside it, or a change from a comment. So dvc.yaml has the stage `sources`, which
always runs and writes a small file for each of the other stages, on which that stage depends. The same content gives the same
fingerprints on every machine; sizes and times only serve to skip files that were read before.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, assert_never

from ommatid.config import STAGE_NAMES, ExtractFiles, ImageSource, Imported, Params
from ommatid.config.intervene import find_prompt_file
from ommatid.config.label import HumanLabeller, names_checksum
from ommatid.errors import without_credentials
from ommatid.store.code import Code
from ommatid.store.filesystem import READ_BYTES, cache_folder, replace_text
from ommatid.store.filesystem.listing import Listed, Listing, list_activations, list_any, list_images, list_masks, list_parquet, list_shards

PLACE = Path("data/sources")
"""Folder of the fingerprint files."""
CODE = "code"
"""Key of the digests of a stage's code, by path inside the package."""
START = "train.init"
"""Key of the SAE that training begins with."""
CHAMPIONS = PLACE.parent / "published/champions"
"""Folder of the champions, each of which has a name that stands for its content."""
_N_READERS = 8

Fingerprints = dict[str, dict[str, Any]]
"""Number, bytes and checksum of files, by the dotted params key that names them; a key that names several files has an index for each. Of a
log of reviews there is only a checksum, of its names."""


def write_sources(params: Params, place: Path = PLACE) -> dict[str, Fingerprints]:
    """Write for each stage the fingerprints of files that its params name, values that DVC does not see, and digests of its code.

    Images, masks and activations from files must exist. Other paths may be names on a model hub, so missing ones are left out; the stage
    that needs them will report it.

    Args:
        params: The params.
        place: Folder to write to.

    Returns:
        The fingerprints of the files by stage.

    Raises:
        SourceError: The images, their masks or the files of activations are missing or cannot be listed.
        ArtefactError: A URL cannot be reached.
    """
    found = {stage: _fingerprint_stage(stage, params) for stage in STAGE_NAMES}
    if START in found["train"] and _is_up_to_date(place.parent / "sae", Path(f"{params.train.init}")):
        found["train"] = found["train"] | _read_start(place / "train.json")
    code = Code()
    place.mkdir(parents=True, exist_ok=True)
    for stage, fingerprints in found.items():
        values = {f"{stage}.{key}": value for key, value in getattr(params, stage).unlisted().items()}
        written = {**values, **fingerprints, CODE: code_of(stage, params, code)}
        replace_text(place / f"{stage}.json", json.dumps(written, indent=1, sort_keys=True) + "\n")
    return found


def _is_up_to_date(saes: Path, start: Path) -> bool:
    """Return whether the trained SAEs began with an SAE or are that SAE. Training then need not run again because of it.

    Otherwise an SAE that wins and becomes the champion would make the training stale that made it, for ever. Only a champion is known by
    its path; the content of any other folder may have changed since.
    """
    is_champion = start.is_relative_to(CHAMPIONS)
    digest = _bytes_of(start / "manifest.json")
    for manifest in (_bytes_of(path) for path in saes.glob("*/manifest.json")):
        with suppress(ValueError, KeyError, AttributeError):
            if manifest and (manifest == digest or (is_champion and json.loads(manifest)["params"].get("init") == f"{start}")):
                return True
    return False


def _read_start(file: Path) -> Fingerprints:
    """Read the recorded fingerprint of the SAE that training began with; empty if there is none."""
    with suppress(ValueError, KeyError):
        return {START: json.loads(_bytes_of(file) or b"{}")[START]}
    return {}


def _bytes_of(path: Path) -> bytes:
    with suppress(OSError):
        return path.read_bytes()
    return b""


def code_of(stage: str, params: Params, code: Code) -> dict[str, str]:
    """Return digests of the code that a stage uses under the present params, by path inside the package; see `Code.used_by`."""
    module = f"ommatid.{stage}.stage"
    if stage == "extract" and isinstance(params.extract, ExtractFiles):
        module = "ommatid.extract.from_files.stage"
    used = {
        "ommatid.extract.from_files.stage": isinstance(params.extract, ExtractFiles),
        "ommatid.train.imported": any(isinstance(one.variant, Imported) for one in params.train.each().values()),
        "ommatid.intervene.answers": params.intervene.answers is not None,
    }
    if stage == "evaluate":
        used |= {f"ommatid.sae.{baseline}": baseline in params.evaluate.baselines for baseline in ("kmeans", "nmf")}
    sections = [params.model_dump(mode="json"), *(one.model_dump(mode="json") for one in params.train.each().values())]
    kinds = {kind for section in sections for kind in _kinds(section)}
    return code.used_by(module, kinds=kinds, without=[name for name, is_used in used.items() if not is_used])


def _kinds(value: Any) -> Iterator[str]:
    """Iterate over all kinds in the params."""
    if isinstance(value, Mapping):
        if isinstance(value.get("kind"), str):
            yield value["kind"]
        value = list(value.values())
    if isinstance(value, list):
        for inside in value:
            yield from _kinds(inside)


def _fingerprint_stage(stage: str, params: Params) -> Fingerprints:
    from_files = isinstance(params.extract, ExtractFiles)
    if stage == "images":  # not used if activations come from files
        return {} if from_files else {"images.source.path": fingerprint(_list_source(params.images.source))}
    if stage == "extract" and isinstance(params.extract, ExtractFiles):
        return {"extract.path": fingerprint(list_activations(params.extract.path))}
    found: Fingerprints = {}
    if stage == "intervene" and (masks := params.intervene.masks):
        found["intervene.masks"] = fingerprint(list_any(masks, "intervene.masks") if masks.endswith(".json") else list_masks(masks))
    named = list(_paths(stage, getattr(params, stage).model_dump(mode="json")))
    logs = {Path(one.path).expanduser() for one in params.label.labellers if isinstance(one, HumanLabeller) and one.is_log}
    found |= {key: fingerprint(list_any(path, key)) for key, path in named if path.exists() and path not in logs}
    names = {key: names_checksum(path) for key, path in named if path in logs}  # ratings and comments change no label
    return found | {key: {"sha256": checksum} for key, checksum in names.items() if checksum}


def list_input(params: Params) -> Listing:
    """List the files that the line begins with, which are images or activations from files.

    Raises:
        SourceError: They are missing or cannot be listed.
        ArtefactError: A URL cannot be reached.
    """
    return list_activations(params.extract.path) if isinstance(params.extract, ExtractFiles) else _list_source(params.images.source)


def key_of_input(params: Params) -> str:
    """Return the params key that names the files that the line begins with."""
    return "extract.path" if isinstance(params.extract, ExtractFiles) else "images.source.path"


def place_of_input(params: Params) -> str:
    """Return the place of the files that the line begins with, as their listing has it, without asking a store for it."""
    place = params.extract.path if isinstance(params.extract, ExtractFiles) else params.images.source.path
    is_url = "://" in place and not place.startswith("file://")
    return without_credentials(place.rstrip("/")) if is_url else os.path.realpath(place.removeprefix("file://"))


def _list_source(source: ImageSource) -> Listing:
    match source.files:
        case "images":
            return list_images(source.path)
        case "parquet":
            return list_parquet(source.path)
        case "shards":
            return list_shards(source.path)
        case "all":
            return list_any(source.path, "images.source.path")
        case _:
            assert_never(source.files)


def _paths(key: str, value: Any) -> Iterator[tuple[str, Path]]:
    """Iterate over the dotted keys and values of a section that may name files or folders, judging by the field's name."""
    if isinstance(value, Mapping):
        for name, inside in value.items():
            yield from _paths(f"{key}.{name}", inside)
    elif isinstance(value, list):
        for i, inside in enumerate(value):
            yield from _paths(f"{key}.{i}", inside)
    elif isinstance(value, str):
        field = next(name for name in reversed(key.split(".")) if not name.isdigit())
        if field in ("path", "words", "head", "attributes", "init"):
            yield key, Path(value).expanduser()
        elif field == "question" and (file := find_prompt_file(value)):
            yield key, file
        elif field == "factory":  # package.module:function
            yield key, Path(value.partition(":")[0].replace(".", "/") + ".py")


def fingerprint(listing: Listing) -> dict[str, Any]:
    """Return number, bytes and checksum of the files in a listing; the checksum covers names and contents."""
    whole = hashlib.sha256()
    for file, checksum in zip(listing.files, _checksums(listing), strict=True):
        whole.update(f"{file.name}\0{checksum}\n".encode())
    return {"n_files": len(listing.files), "bytes": sum(file.size for file in listing.files), "sha256": whole.hexdigest()}


def _checksums(listing: Listing) -> list[str]:
    """Return the checksum of each file, from the cache if its size and times are unchanged, else by reading the file."""
    if listing.files[0].path is None:
        return [f"{file.size} {file.stamp}" for file in listing.files]  # contains the store's own checksum
    cache = cache_folder() / "checksums" / f"{hashlib.sha256(os.fsencode(listing.place)).hexdigest()[:32]}.json"
    known = _load(cache)
    facts = {file.inside: file.facts for file in listing.files}  # before reading: a file that settles meanwhile may have changed since
    missing = [file for file in listing.files if not facts[file.inside] or known.get(file.inside, ("", ""))[0] != facts[file.inside]]
    with ThreadPoolExecutor(_N_READERS) as pool:
        read = dict(zip((file.inside for file in missing), pool.map(_checksum, missing), strict=True))
    found = [read[file.inside] if file.inside in read else known[file.inside][1] for file in listing.files]
    if missing or len(known) != len(found):
        settled = {name: (of_file, sum_) for (name, of_file), sum_ in zip(facts.items(), found, strict=True) if of_file}
        with suppress(OSError):  # without the cache all files are read again, which is only slower
            cache.parent.mkdir(parents=True, exist_ok=True)
            replace_text(cache, json.dumps(settled))
    return found


def _checksum(file: Listed) -> str:
    digest = hashlib.sha256()
    try:
        with file.folder.open(file.inside) as opened:
            while block := opened.read(READ_BYTES):
                digest.update(block)
    except OSError as error:
        return f"cannot be read: {os.strerror(error.errno) if error.errno else type(error).__name__}"
    return digest.hexdigest()


def _load(cache: Path) -> dict[str, tuple[str, str]]:
    try:
        os.utime(cache)  # by which `ommatid gc` knows that it is used
        return {name: (facts, checksum) for name, (facts, checksum) in json.loads(cache.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
