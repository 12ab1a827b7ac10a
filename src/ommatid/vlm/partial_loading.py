"""Loading of single sub-modules: only their weights are read from the shards of a model that may have many gigabytes."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ommatid.errors import ModelError
from ommatid.vlm import hub

SHARDS = {"weights in safetensors (*.safetensors)": ("*.safetensors",)}
"""Files that the folder must have. Pickled weights cannot be read in parts."""
INDEX = "model.safetensors.index.json"
Shapes = Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]]


def read_weights(folder: Path, part: str, path: str, key: str) -> dict[str, Tensor]:
    """Read the weights of a sub-module, and nothing else.

    Args:
        folder: Folder from `hub.locate`.
        part: Name of the sub-module, such as `vision_tower`. Some versions of transformers prefix it with `model.` in their files.
        path: Folder or hub name that the user gave.
        key: Key of the parameter, for messages.

    Returns:
        The weights, by their names within the sub-module.

    Raises:
        ModelError: A shard is missing or damaged, or no shard has weights of the sub-module.
    """
    pattern = re.compile(rf"(?:model\.)?{re.escape(part)}\.(.+)")
    weights: dict[str, Tensor] = {}
    for file, names in _shards(folder, path, key).items():
        wanted = {name: match[1] for name in names if (match := pattern.fullmatch(name))}
        if wanted:
            weights |= {wanted[name]: tensor for name, tensor in _read(folder / file, list(wanted), path, key).items()}
    if not weights:
        raise ModelError(f"{key}: {path}: the weights contain no {part}; is this the folder of the full model?")
    return weights


def count_weights(folder: Path, path: str, key: str) -> int:
    """Count the numbers in all weights, from the headers of the shards alone.

    Args:
        folder: Folder from `hub.locate`.
        path: Folder or hub name that the user gave.
        key: Key of the parameter, for messages.

    Returns:
        The count.

    Raises:
        ModelError: A shard is missing or damaged.
    """
    return sum(_count(folder / file, names, path, key) for file, names in _shards(folder, path, key).items())


def load_pretrained(cls: Any, config: Any, weights: Mapping[str, Tensor], part: str, path: str, key: str) -> Any:
    """Make a transformers model from weights, in float32, ready for inference.

    Args:
        cls: Class of the model.
        config: Config of the model.
        weights: Weights by name.
        part: Name of the sub-module, for messages.
        path: Folder or hub name that the user gave.
        key: Key of the parameter, for messages.

    Returns:
        The model.

    Raises:
        ModelError: Weights are missing, or do not fit the config.
    """
    with hub.reading(path, key, part):
        hub.refuse_larger(cls, config, sum(weight.nbytes for weight in weights.values()), path, key)
        model, info = cls.from_pretrained(
            None, config=config, state_dict=dict(weights), output_loading_info=True, ignore_mismatched_sizes=True, dtype=torch.float32
        )
    mismatched = ((name, tuple(found), tuple(expected)) for name, found, expected in info["mismatched_keys"])
    _check(info["missing_keys"], mismatched, part, path, key)
    return model.eval().requires_grad_(False)


def load_module(module: nn.Module, weights: Mapping[str, Tensor], part: str, path: str, key: str) -> Any:
    """Load weights in float32 into a module that has no buffers and was made on the device `meta`.

    Args:
        module: The module.
        weights: Weights by name.
        part: Name of the sub-module, for messages.
        path: Folder or hub name that the user gave.
        key: Key of the parameter, for messages.

    Returns:
        The module, ready for inference.

    Raises:
        ModelError: Weights are missing, or do not fit the config.
    """
    expected = module.state_dict()
    shared = sorted(set(expected) & set(weights))
    shapes = ((name, tuple(weights[name].shape), tuple(expected[name].shape)) for name in shared)
    _check(set(expected) - set(weights), (shape for shape in shapes if shape[1] != shape[2]), part, path, key)
    module.load_state_dict({name: weights[name].float() for name in shared}, assign=True)
    return module.eval().requires_grad_(False)


def _check(missing: Iterable[str], mismatched: Shapes, part: str, path: str, key: str) -> None:
    for name, found, expected in sorted(mismatched):
        raise ModelError(
            f"{key}: {path}: {part}.{name} has the shape {list(found)}, but according to config.json {list(expected)}; "
            "do config.json and the weights belong to the same model?"
        )
    lacking = sorted(missing)
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        names = ", ".join(f"{part}.{name}" for name in lacking[:3])
        raise ModelError(f"{key}: {path}: the weights lack {names}{more}; is the file complete, and of this model?")


def _shards(folder: Path, path: str, key: str) -> dict[str, list[str]]:
    """Return the names of the weights by file, from the index or from the headers of the files."""
    index = folder / INDEX
    if not index.is_file():
        return {file.name: _names(file, path, key) for file in sorted(folder.glob("*.safetensors"))}
    try:
        file_of: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{key}: {path}: {INDEX} cannot be read: {error!r}") from None
    shards: dict[str, list[str]] = {}
    for name, file in sorted(file_of.items()):
        shards.setdefault(file, []).append(name)
    return shards


def _names(file: Path, path: str, key: str) -> list[str]:
    try:
        with safe_open(file, "pt") as shard:
            return list(shard.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{key}: {path}: {file.name} cannot be read: {error}") from None


def _read(file: Path, names: list[str], path: str, key: str) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as shard:
            return {name: shard.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{key}: {path}: {file.name}, which holds {names[0]}, cannot be read: {error}") from None


def _count(file: Path, names: list[str], path: str, key: str) -> int:
    try:
        with safe_open(file, "pt") as shard:
            return sum(math.prod(shard.get_slice(name).get_shape()) for name in names)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{key}: {path}: {file.name}, which holds {names[0]}, cannot be read: {error}") from None
