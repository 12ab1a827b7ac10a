"""Files of activations that were made elsewhere, found and opened by their endings. See docs/import.md."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ommatid.errors import SourceError
from ommatid.extract.activation_file import IMAGE, ActivationFile, text_of
from ommatid.extract.array_files import Npy, Pt, Safetensors
from ommatid.extract.parquet_file import ParquetFile


def open_files(place: Path, key: str | None) -> list[ActivationFile]:
    """The files at `place`, a file or a folder, in order of name, where part10 comes after part9.

    Raises:
        SourceError: nothing there, several formats, or a file that does not hold what docs/import.md asks for.
    """
    paths = _find(place)
    formats = {path.suffix: path for path in paths}
    if len({FORMATS[suffix] for suffix in formats}) > 1:
        first, second, *_ = formats.values()
        raise SourceError(f"{place}: holds files of several formats, such as {first.name} and {second.name}; give each a folder of its own")
    files = [FORMATS[path.suffix](path, key) for path in paths]
    for file in files:
        _check_alike(files[0], file)
    return files


def _find(place: Path) -> list[Path]:
    if not place.exists():
        raise SourceError(f"{place}: no such file or folder; set extract.path to a folder of {_NAMES} files, or to one of them")
    if place.is_file():
        if place.suffix not in FORMATS:
            raise SourceError(f"{place}: extract.path must end in {_NAMES}, or be a folder of such files")
        return [place]
    found = (path for path in place.rglob("*") if path.suffix in FORMATS and path.is_file() and not _is_hidden(path.relative_to(place)))
    paths = sorted((path for path in found if not path.name.endswith(f".{IMAGE}.npy")), key=_natural)
    if not paths:
        raise SourceError(f"{place}: there are no {_NAMES} files in this folder; change extract.path")
    return paths


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Numbers in names count as numbers: writers of per-batch parts rarely pad them."""
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
_NAMES = ", ".join(FORMATS)
