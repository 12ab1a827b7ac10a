"""Discovery of files of activations, whose endings say how to open them. See docs/users/activations.md."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ommatid.errors import SourceError
from ommatid.extract.from_files.arrays import Npy, Pt, Safetensors
from ommatid.extract.from_files.base import IMAGE, ActivationFile, text_of
from ommatid.extract.from_files.parquet import ParquetFile
from ommatid.store.filesystem.listing import ACTIVATIONS, list_activations, some_of


def open_files(place: str, key: str | None) -> tuple[list[ActivationFile], list[str]]:
    """Open the files of activations at a path.

    Args:
        place: Path of a file or a folder.
        key: `extract.key`, the name of the activations in each file; None if there should be only one candidate.

    Returns:
        The files in order of name, with part10 after part9, and sentences about what is not read.

    Raises:
        SourceError: There is no such file, there are several formats, or a file does not meet the contract of docs/users/activations.md.
    """
    if "://" in place:
        raise SourceError(f"{place}: extract.path must be on this machine, because files of activations are memory-mapped; copy them first")
    listing = list_activations(place)
    paths = sorted((file.path for file in listing.files if file.path), key=_natural)
    for path in paths:
        if path.suffix.lower() not in FORMATS:
            raise SourceError(f"{path}: extract.path must end in {_NAMES}, or be a folder of such files")
    beside = {path for path in paths if path.name.endswith(f".{IMAGE}.npy")} if len(paths) > 1 else set()
    paths = [path for path in paths if path not in beside]
    _check_beside(beside, paths)
    formats = {path.suffix.lower(): path for path in paths}
    if len({FORMATS[suffix] for suffix in formats}) > 1:
        first, second, *_ = formats.values()
        raise SourceError(f"{place}: holds files of several formats, such as {first.name} and {second.name}; give each a folder of its own")
    files = [FORMATS[path.suffix.lower()](path, key) for path in paths]
    for file in files:
        _check_alike(files[0], file)
    return files, [f"{place}: {sentence}" for sentence in listing.notice(ACTIVATIONS)] + _unread(files)


def _check_beside(images: Collection[Path], paths: Collection[Path]) -> None:
    """Check that each file of images lies beside its file of activations.

    Raises:
        SourceError: A file of activations is missing.
    """
    for path in images:
        if (owner := path.with_name(path.name.removesuffix(f".{IMAGE}.npy") + ".npy")) not in paths:
            raise SourceError(f"{path}: holds the images of the entries of {owner.name}, and there is no such file; name them alike")


def _unread(files: Sequence[ActivationFile]) -> list[str]:
    """Return a sentence about tensors or columns that are not read, or an empty list if there are none."""
    names = list(dict.fromkeys(name for file in files for name in file.unread))
    return [f"{files[0].path.parent}: {some_of(names)} in the files {'is' if len(names) == 1 else 'are'} not read"] if names else []


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return a sort key that compares numbers in names as numbers, because programs that number their files rarely pad with zeros."""
    return [(int(text), "") if text.isdigit() else (-1, text) for text in re.split(r"([0-9]+)", path.as_posix())]


def _check_alike(first: ActivationFile, other: ActivationFile) -> None:
    if first.shape[1:] != other.shape[1:]:
        raise SourceError(
            f"{first.path} and {other.path} differ in shape: {text_of(first.shape)} and {text_of(other.shape)}; "
            "all files of one import must agree in everything but their number of entries"
        )
    if first.has_images != other.has_images:
        with_, without = (first, other) if first.has_images else (other, first)
        raise SourceError(f"{with_.path} has {IMAGE!r} ids and {without.path} has none; give them to all files or to none")


FORMATS: Mapping[str, Any] = {".npy": Npy, ".safetensors": Safetensors, ".pt": Pt, ".pth": Pt, ".parquet": ParquetFile}
_NAMES = ", ".join(ACTIVATIONS)
