"""Checkpoints: the state of a computation, saved from time to time, from which a killed run continues bit for bit.

Objects that hold state are `Stateful`, like torch's modules and optimisers, and only `Checkpoint` reads and writes the files. Results that
are final once computed, such as finished shards and a labeller's answers, are written one by one and need no checkpoint.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SECONDS = 60.0
"""Age of the last checkpoint, in seconds, at which the next one is due. A killed run loses about as much work."""

State = Mapping[str, Tensor]
"""Tensors by name. Names inside nested objects are joined by slashes."""


@runtime_checkable
class Stateful(Protocol):
    """An object whose state can be saved, and loaded into another that was made in the same way."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Load the state that `state_dict` returned."""
        ...


class Accumulator:
    """A `Stateful` object whose state is a list of attributes.

    Each attribute is a tensor, an array, a number, None, a `Stateful` object, or a list or dictionary of such values.
    """

    STATE: ClassVar[tuple[str, ...]]
    """Names of the attributes. All others must be determined by the arguments of the constructor."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the attributes that `STATE` names."""
        return flatten({name: getattr(self, name) for name in self.STATE})

    def load_state_dict(self, state: State) -> None:
        """Set the attributes that `STATE` names."""
        for name in self.STATE:
            setattr(self, name, _restored(getattr(self, name), state, name))


def flatten(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state of several named values of the kinds that `Accumulator` allows."""
    return {name: tensor for key, value in values.items() for name, tensor in _flat(value, key)}


def inside(state: State, name: str) -> dict[str, Tensor]:
    """Return the part of a state that belongs to the object of this name."""
    return {key.removeprefix(f"{name}/"): tensor for key, tensor in state.items() if key.startswith(f"{name}/")}


def restore(objects: Mapping[str, Any], state: State) -> None:
    """Load the state of `Stateful` objects, or of lists of them, by their names."""
    for name, value in objects.items():
        _restored(value, state, name)


def _flat(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    match value:
        case None:
            return
        case Tensor():
            yield name, value
        case np.ndarray():
            yield name, torch.from_numpy(value)
        case float():
            yield name, torch.tensor(value, dtype=torch.float64)
        case int():
            yield name, torch.tensor(value, dtype=torch.int64)
        case Stateful():
            yield from ((f"{name}/{key}", tensor) for key, tensor in value.state_dict().items())
        case list():
            yield from (pair for i, item in enumerate(value) for pair in _flat(item, f"{name}/{i}"))
        case dict():
            yield from (pair for key, item in value.items() for pair in _flat(item, f"{name}/{key}"))
        case _:
            raise AssertionError(f"{name}: a {type(value).__name__} cannot be saved as state")


def _restored(old: Any, state: State, name: str) -> Any:
    """Return the saved value that replaces `old`. A `Stateful` object is kept, and loads its own state."""
    match old:
        case None:
            return state.get(name)
        case Tensor():
            return state[name].to(old.device)
        case np.ndarray():
            return state[name].numpy()
        case int() | float():
            return type(old)(state[name].item())
        case Stateful():
            old.load_state_dict(inside(state, name))
            return old
        case list():
            return [_restored(item, state, f"{name}/{i}") for i, item in enumerate(old)]
        case dict():
            return {key: _restored(item, state, f"{name}/{key}") for key, item in old.items()}
        case _:
            raise AssertionError(f"{name}: a {type(old).__name__} cannot be restored from state")


class Files(Protocol):
    """A place for checkpoint files, such as a draft."""

    def has(self, name: str) -> bool:
        """Return whether the file exists and is undamaged."""
        ...

    def local(self, name: str) -> Path:
        """Return the path of the file on this machine."""
        ...

    def write_file(self, name: str) -> AbstractContextManager[Path]:
        """Return a context manager that yields a path to write to, and puts the file in place atomically when its block ends."""
        ...

    def remove(self, name: str) -> None:
        """Remove the file."""
        ...


class Checkpoint:
    """A file with the last state of a computation."""

    def __init__(self, files: Files, name: str) -> None:
        self._files = files
        self._name = name
        self._written = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the last checkpoint is old enough for the next to be written."""
        return time.monotonic() - self._written > SECONDS

    def load(self) -> dict[str, Tensor]:
        """Return the saved state, or an empty dict if there is none."""
        if not self._files.has(self._name):
            return {}
        # Cloned because tensors loaded from a file are not aligned in memory, which changes the last bits of products.
        return {name: tensor.clone() for name, tensor in load_file(self._files.local(self._name)).items()}

    def save(self, values: Mapping[str, Any]) -> None:
        """Save the state of several values (see `flatten`), replacing the last checkpoint."""
        with self._files.write_file(self._name) as path:
            save_file(_unshared(flatten(values)), path)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Delete the file, if there is one."""
        self._files.remove(self._name)


def _unshared(tensors: State) -> dict[str, Tensor]:
    """Return contiguous tensors that share no memory, as safetensors requires."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.detach().contiguous()
        place = whole.untyped_storage().data_ptr()
        found[name] = whole.clone() if place in seen else whole
        seen.add(place)
    return found
