"""Parts of a model folder: reads the weights of one sub-module from the shards, and nothing else of a model of many gigabytes."""

import json
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
"""What the folder must have: pickled weights cannot be read in parts."""
INDEX = "model.safetensors.index.json"
Shapes = Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]]


def read_weights(folder: Path, part: str, path: str, key: str) -> dict[str, Tensor]:
    """The weights of the sub-module `part`, such as `vision_tower`, by their names in it; only their bytes are read.

    Folders that older versions of transformers saved put `model.` before `part`.

    Args:
        folder: From `hub.locate`.
        part: The sub-module.
        path: What the user wrote.
        key: Where it is written.

    Raises:
        ModelError: a shard is missing or damaged, or none has weights of that sub-module.
    """
    pattern = re.compile(rf"(?:model\.)?{re.escape(part)}\.(.+)")
    weights: dict[str, Tensor] = {}
    for file, names in _shards(folder, path, key).items():
        wanted = {name: match[1] for name in names if (match := pattern.fullmatch(name))}
        if wanted:
            weights |= {wanted[name]: tensor for name, tensor in _read(folder / file, list(wanted), path, key).items()}
    if not weights:
        raise ModelError(f"{key}: {path}: the weights lack every one of {part}; is the folder that of the full model?")
    return weights


def load_pretrained(cls: Any, config: Any, weights: Mapping[str, Tensor], part: str, path: str, key: str) -> Any:
    """A transformers model made of `weights`, in float32, ready for inference.

    Raises:
        ModelError: weights are missing or do not fit the config.
    """
    with hub.reading(path, key, part):
        hub.refuse_larger(cls, config, sum(weight.nbytes for weight in weights.values()), path, key)
        model, info = cls.from_pretrained(
            None, config=config, state_dict=dict(weights), output_loading_info=True, ignore_mismatched_sizes=True, dtype=torch.float32
        )
    mismatched = ((name, tuple(came), tuple(wanted)) for name, came, wanted in info["mismatched_keys"])
    _check(info["missing_keys"], mismatched, part, path, key)
    return model.eval().requires_grad_(False)


def load_module(module: nn.Module, weights: Mapping[str, Tensor], part: str, path: str, key: str) -> Any:
    """A module without buffers, made on the device `meta`, that gets `weights`, in float32, ready for inference.

    Raises:
        ModelError: weights are missing or do not fit the config.
    """
    expected = module.state_dict()
    both = sorted(set(expected) & set(weights))
    shapes = ((name, tuple(weights[name].shape), tuple(expected[name].shape)) for name in both)
    _check(set(expected) - set(weights), (one for one in shapes if one[1] != one[2]), part, path, key)
    module.load_state_dict({name: weights[name].float() for name in both}, assign=True)
    return module.eval().requires_grad_(False)


def _check(missing: Iterable[str], mismatched: Shapes, part: str, path: str, key: str) -> None:
    for name, came, wanted in sorted(mismatched):
        raise ModelError(
            f"{key}: {path}: {part}.{name} has the shape {list(came)}, and by config.json it has {list(wanted)}; "
            "are config.json and the weights of the same model?"
        )
    lacking = sorted(missing)
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        names = ", ".join(f"{part}.{name}" for name in lacking[:3])
        raise ModelError(f"{key}: {path}: the weights lack {names}{more}; is the file whole, and of this model?")


def _shards(folder: Path, path: str, key: str) -> dict[str, list[str]]:
    """The names of the weights by file: from the index, or from the files' headers."""
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
