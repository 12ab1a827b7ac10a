"""Attributes of images that a file gives, such as whether there is a ruler: what a latent may follow in place of a class."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ommatid.errors import ConfigError
from ommatid.events import Listener, Warned, ignore
from ommatid.store import Artefact

KEY = "intervene.audit.attributes"
IMAGE_COLUMNS = ("path", "image_id", "image")
"""Columns of the relation `images` by which a file may name images."""
VALUES = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
"""Values of an attribute, in lower case. An empty one means that it is not known."""

Attributes = Mapping[str, Mapping[int, bool]]
"""By the name of each attribute, whether images have it, by image number; images of which it is not known are left out."""


def load_attributes(path: str, images: Artefact, on_event: Listener = ignore) -> Attributes:
    """Read the attributes of images from a CSV or Parquet file.

    Args:
        path: The file. One of its columns is `path`, `image_id` or `image`, with values of that column of the relation `images`; every
            other column is an attribute, whose values are yes or no (or true and false, or 1 and 0), or empty.
        images: The images artefact.
        on_event: Called with a warning if rows name no image of the study.

    Raises:
        ConfigError: The file cannot be read, lacks a column, names an image twice or none of the study, or has another value.
    """
    columns, rows = _read(Path(path).expanduser())
    name = next((one for one in IMAGE_COLUMNS if one in columns), None)
    attributes = [one for one in columns if one != name]
    if name is None or not attributes:
        need = f"one of {', '.join(IMAGE_COLUMNS)} that names the image, and another for each attribute, such as path,ruler"
        raise ConfigError(f"{KEY}: {path} has the columns {', '.join(columns) or 'none'}; it needs {need}")
    table = images.read("images", ["image", name] if name != "image" else ["image"])
    numbers = dict(zip(map(str, table[name].to_pylist()), table["image"].to_pylist(), strict=True))
    found: dict[str, dict[int, bool]] = {one: {} for one in attributes}
    seen: set[str] = set()
    for place, row in enumerate(rows, start=1):
        key = str(row[name])
        if key in seen:
            raise ConfigError(f"{KEY}: {path}: row {place} names {key!r} again; give each image one row")
        seen.add(key)
        for one in attributes:
            value = _value(row[one], f"{path}: row {place}, {one}")
            if value is not None and key in numbers:
                found[one][numbers[key]] = value
    if not seen & numbers.keys():
        example = next(iter(numbers), "none")
        raise ConfigError(f"{KEY}: {path} names none of the study's images by {name}; there, an image is {example!r}")
    if unknown := [key for key in seen if key not in numbers]:
        on_event(
            Warned(f"{KEY}: {len(unknown)} of {len(seen)} rows of {path} name no image of the study by {name}, such as {min(unknown)!r}")
        )
    return found


def _value(given: Any, where: str) -> bool | None:
    text = "" if given is None else str(given).strip().lower()
    if text and text not in VALUES:
        raise ConfigError(f"{KEY}: {where} is {str(given)[:80]!r}; allowed are yes, no, true, false, 1, 0, or nothing if it is not known")
    return VALUES.get(text)


def _read(path: Path) -> tuple[list[str], Iterator[Mapping[str, Any]]]:
    """Read the columns and the rows of a file.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            return table.column_names, iter(table.to_pylist())
        lines = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines(), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowInvalid) as error:
        raise ConfigError(f"{KEY}: {path} cannot be read as {'Parquet' if path.suffix == '.parquet' else 'CSV'}: {error}") from None
    columns = lines[0] if lines else []
    if odd := [place for place, line in enumerate(lines[1:], start=1) if line and len(line) != len(columns)]:
        raise ConfigError(f"{KEY}: {path}: row {odd[0]} has {len(lines[odd[0]])} values, but there are {len(columns)} columns")
    return columns, (dict(zip(columns, line, strict=True)) for line in lines[1:] if line)
