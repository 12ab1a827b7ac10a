"""Files of other libraries: JSON, safetensors, and what torch.save wrote, of which no code is ever run."""

import io
import json
import math
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ommatid.errors import ModelError

PT = (".pt", ".pth", ".bin", ".ckpt")
MAX_JSON = 16 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ModelError: missing, too large, or not a JSON object.
    """
    if not path.is_file():
        raise ModelError(f"{path}: missing; it belongs beside the weights")
    if path.stat().st_size > MAX_JSON:
        raise ModelError(f"{path}: {path.stat().st_size} bytes; the configuration of an SAE has at most {MAX_JSON}")
    return parse_json(path.read_bytes(), path)


def parse_json(text: bytes, where: Path) -> dict[str, Any]:
    """The object that `text` is.

    Raises:
        ModelError: it is not a JSON object.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ModelError(f"{where}: holds a {type(values).__name__}; expected a JSON object")
    return values


def child(values: Mapping[str, Any], name: str, where: Path) -> dict[str, Any]:
    """The object under `name`, empty where there is none.

    Raises:
        ModelError: it is something else.
    """
    found = values.get(name)
    if found is not None and not isinstance(found, dict):
        raise ModelError(f"{where}: {name} is {found!r}; expected an object")
    return found or {}


def text(values: Mapping[str, Any], name: str, where: Path) -> str | None:
    """The text under `name`, or None.

    Raises:
        ModelError: it is something else.
    """
    found = values.get(name)
    if found is not None and not isinstance(found, str):
        raise ModelError(f"{where}: {name} is {found!r}; expected text")
    return found or None


def number(values: Mapping[str, Any], name: str, where: Path) -> float | None:
    """The number above 0 under `name`, or None.

    Raises:
        ModelError: it is something else.
    """
    found = values.get(name)
    if found is not None and (isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < math.inf):
        raise ModelError(f"{where}: {name} is {found!r}; expected a number above 0")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pt file by name.

    Raises:
        ModelError: missing, damaged, not a flat dict of tensors, or it holds more than tensors.
    """
    if not path.is_file():
        raise ModelError(f"{path}: missing; it holds the weights")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return read_pt(path, path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file by name.

    Raises:
        ModelError: missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; it holds the weights") from None
    except SafetensorError as error:
        raise ModelError(f"{path}: not a whole safetensors file ({error})") from None


def read_pt(source: Path | io.BytesIO, where: Path) -> dict[str, Tensor]:
    """The state dict that torch.save wrote; nothing in it is run.

    Raises:
        ModelError: damaged, not a flat dict of tensors, or it holds more than tensors.
    """
    is_zip = zipfile.is_zipfile(source)
    if is_zip:
        _refuse_bomb(source, where)
    if isinstance(source, io.BytesIO):
        source.seek(0)
    try:
        with warnings.catch_warnings(action="ignore"):
            values = torch.load(source, map_location="cpu", weights_only=True, mmap=is_zip and isinstance(source, Path))
    except pickle.UnpicklingError as error:
        raise ModelError(f"{where}: {_why_not_loaded(error)}") from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
        raise ModelError(f"{where}: not a whole file of torch.save ({str(error).partition('. ')[0] or 'it ends early'})") from None
    return check_state(values, where)


def _why_not_loaded(error: pickle.UnpicklingError) -> str:
    """Weights-only loading refuses objects; a file that is no pickle fails with the same class."""
    if "GLOBAL" not in str(error) and "global" not in str(error):
        return "not a file of torch.save; .pt files of SAEs are what torch.save(sae.state_dict(), path) writes"
    return (
        "holds objects beside tensors; reading them would run code from the file, which is refused. "
        "Where it was made, write torch.save(sae.state_dict(), path), and import that"
    )


def _refuse_bomb(source: Path | io.BytesIO, where: Path) -> None:
    """torch.save stores without compression: what is compressed is not its file, and may unpack without end."""
    with zipfile.ZipFile(source) as archive:
        entries = archive.infolist()
    size = source.stat().st_size if isinstance(source, Path) else source.getbuffer().nbytes
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > size:
        raise ModelError(f"{where}: {size} bytes that unpack to {unpacked}; torch.save never compresses, so this is not its file")


def check_state(values: object, where: Path) -> dict[str, Tensor]:
    """A flat dict of tensors, each with storage of its own size.

    Raises:
        ModelError: it is something else.
    """
    if not isinstance(values, Mapping):
        raise ModelError(f"{where}: holds a {type(values).__name__}; expected a dict of tensors, as sae.state_dict() is")
    if odd := [str(name) for name, value in values.items() if not isinstance(name, str) or not _is_plain(value)]:
        raise ModelError(f"{where}: {', '.join(odd[:5])}: not plain tensors; expected a flat dict of tensors, as sae.state_dict() is")
    if large := [name for name, value in values.items() if value.numel() * value.element_size() > value.untyped_storage().nbytes()]:
        raise ModelError(f"{where}: {', '.join(large[:5])}: larger than the numbers that the file holds for it")
    return dict(values)


def _is_plain(value: object) -> bool:
    """A dense tensor of real numbers, whose numbers are here."""
    return isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu" and not value.is_complex()


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
