"""Readers of other libraries' files: JSON, safetensors, and files written by torch.save. No code in a file is ever run."""

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
    """Read a JSON object from a file.

    Returns:
        The object.

    Raises:
        ModelError: The file is missing, too large, or not a JSON object.
    """
    if not path.is_file():
        raise ModelError(f"{path}: missing; it belongs beside the weights")
    if path.stat().st_size > MAX_JSON:
        raise ModelError(f"{path}: {path.stat().st_size} bytes; the configuration of an SAE may have at most {MAX_JSON}")
    return parse_json(path.read_bytes(), path)


def parse_json(text: bytes, where: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Returns:
        The object.

    Raises:
        ModelError: The text is not a JSON object.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ModelError(f"{where}: holds a {type(values).__name__}; expected a JSON object")
    return values


def child(values: Mapping[str, Any], name: str, where: Path) -> dict[str, Any]:
    """Return the object under a key, or an empty dict if the key is missing.

    Raises:
        ModelError: The value is not an object.
    """
    found = values.get(name)
    if found is not None and not isinstance(found, dict):
        raise ModelError(f"{where}: {name} is {found!r}; expected an object")
    return found or {}


def text(values: Mapping[str, Any], name: str, where: Path) -> str | None:
    """Return the text under a key, or None if the key is missing.

    Raises:
        ModelError: The value is not text.
    """
    found = values.get(name)
    if found is not None and not isinstance(found, str):
        raise ModelError(f"{where}: {name} is {found!r}; expected text")
    return found or None


def number(values: Mapping[str, Any], name: str, where: Path) -> float | None:
    """Return the number under a key, or None if the key is missing.

    Raises:
        ModelError: The value is not a number above 0.
    """
    found = values.get(name)
    if found is not None and (isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < math.inf):
        raise ModelError(f"{where}: {name} is {found!r}; expected a number above 0")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors or .pt file.

    Returns:
        The tensors, by name.

    Raises:
        ModelError: The file is missing or damaged, or holds anything but a flat dict of tensors.
    """
    if not path.is_file():
        raise ModelError(f"{path}: missing; it holds the weights")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return read_pt(path, path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file.

    Returns:
        The tensors, by name.

    Raises:
        ModelError: The file is missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; it holds the weights") from None
    except SafetensorError as error:
        raise ModelError(f"{path}: not a complete safetensors file ({error})") from None


def read_pt(source: Path | io.BytesIO, where: Path) -> dict[str, Tensor]:
    """Read a state dict that torch.save wrote, without running any code in it.

    Args:
        source: Path, or bytes in memory.
        where: Path to name in messages.

    Returns:
        The tensors, by name.

    Raises:
        ModelError: The file is damaged, or holds anything but a flat dict of tensors.
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
        raise ModelError(
            f"{where}: not a complete file written by torch.save ({str(error).partition('. ')[0] or 'it ends early'})"
        ) from None
    return check_state(values, where)


def _why_not_loaded(error: pickle.UnpicklingError) -> str:
    """Explain an error of weights-only loading, whose class is the same for pickled objects and for files that are not pickles."""
    if "GLOBAL" not in str(error) and "global" not in str(error):
        return "not a file written by torch.save; write the .pt file of an SAE with torch.save(sae.state_dict(), path)"
    return (
        "holds objects other than tensors; reading them would run code from the file, which is refused. "
        "Where the library is installed, write torch.save(sae.state_dict(), path), and import that file"
    )


def _refuse_bomb(source: Path | io.BytesIO, where: Path) -> None:
    """Refuse a compressed archive, which torch.save never writes, and which could unpack to any size."""
    with zipfile.ZipFile(source) as archive:
        entries = archive.infolist()
    size = source.stat().st_size if isinstance(source, Path) else source.getbuffer().nbytes
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > size:
        raise ModelError(f"{where}: {size} bytes that unpack to {unpacked}; torch.save never compresses, so it did not write this file")


def check_state(values: object, where: Path) -> dict[str, Tensor]:
    """Check that values are a flat dict of tensors, none of which is larger than its storage.

    Args:
        values: Values read from a file.
        where: Path to name in messages.

    Returns:
        The tensors, by name.

    Raises:
        ModelError: The values are anything else.
    """
    if not isinstance(values, Mapping):
        raise ModelError(f"{where}: holds a {type(values).__name__}; expected a dict of tensors, such as sae.state_dict()")
    if odd := [str(name) for name, value in values.items() if not isinstance(name, str) or not _is_plain(value)]:
        raise ModelError(f"{where}: {', '.join(odd[:5])}: not plain tensors; expected a flat dict of tensors, such as sae.state_dict()")
    if large := [name for name, value in values.items() if value.numel() * value.element_size() > value.untyped_storage().nbytes()]:
        raise ModelError(f"{where}: {', '.join(large[:5])}: larger than the values that the file holds for it")
    return dict(values)


def _is_plain(value: object) -> bool:
    """Return whether a value is a dense tensor of real numbers on the CPU."""
    return isinstance(value, Tensor) and value.layout is torch.strided and value.device.type == "cpu" and not value.is_complex()


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
