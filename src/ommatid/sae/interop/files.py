"""Files of other libraries: JSON, safetensors, and what torch.save wrote, of which no code is ever run."""

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pt file by name.

    Raises:
        ModelError: missing, damaged, not a flat dict of tensors, or it holds more than tensors.
    """
    if not path.is_file():
        raise ModelError(f"{path}: missing; it holds the weights")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    with path.open("rb") as file:
        return read_pt(file, path)


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


def read_pt(file: BinaryIO, where: Path) -> dict[str, Tensor]:
    """The state dict that torch.save wrote from here to the file's end; nothing in it is run.

    Raises:
        ModelError: damaged, not a flat dict of tensors, or it holds more than tensors.
    """
    buffer = io.BytesIO(file.read())
    _refuse_bomb(buffer, where)
    try:
        values = torch.load(buffer, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(f"{where}: {_why_not_loaded(error)}") from None
    except (RuntimeError, EOFError, ValueError, KeyError, UnicodeDecodeError, OSError) as error:
        raise ModelError(
            f"{where}: not a whole file of torch.save ({str(error).splitlines()[0] if str(error) else 'it ends early'})"
        ) from None
    return check_state(values, where)


def _why_not_loaded(error: pickle.UnpicklingError) -> str:
    """Weights-only loading refuses objects; a file that is no pickle fails with the same class."""
    if "GLOBAL" not in str(error) and "global" not in str(error):
        return "not a file of torch.save; .pt files of SAEs are what torch.save(sae.state_dict(), path) writes"
    return (
        "holds objects beside tensors; reading them would run code from the file, which is refused. "
        "Where it was made, write torch.save(sae.state_dict(), path), and import that"
    )


def _refuse_bomb(buffer: io.BytesIO, where: Path) -> None:
    """torch.save stores without compression: what is compressed is not its file, and may unpack without end."""
    size = buffer.getbuffer().nbytes
    if not zipfile.is_zipfile(buffer):
        buffer.seek(0)
        return
    buffer.seek(0)
    with zipfile.ZipFile(buffer) as archive:
        entries = archive.infolist()
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ModelError(f"{where}: {size} bytes that unpack to {unpacked}; torch.save never compresses, so this is not its file")
    buffer.seek(0)


def check_state(values: object, where: Path) -> dict[str, Tensor]:
    """A flat dict of tensors, each with storage of its own size.

    Raises:
        ModelError: it is something else.
    """
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise ModelError(f"{where}: holds a {type(values).__name__}; expected a dict of tensors, as sae.state_dict() is")
    if odd := [name for name, value in values.items() if not isinstance(value, Tensor)]:
        raise ModelError(f"{where}: {', '.join(odd[:5])}: not tensors; expected a flat dict of tensors, as sae.state_dict() is")
    if large := [name for name, value in values.items() if value.numel() * value.element_size() > value.untyped_storage().nbytes()]:
        raise ModelError(f"{where}: {', '.join(large[:5])}: larger than the numbers that the file holds for it")
    return dict(values)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
