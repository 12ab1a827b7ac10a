"""How far evaluation has come, on disk: a run that was killed goes on from there, and ends with the same bytes.

What accumulates keeps its state in public attributes; private ones are made anew. So a checkpoint is a walk over public attributes:
tensors, arrays, numbers, and objects of this package, dicts and lists that hold them. A new accumulator need not be named to be in it.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ommatid.store import Draft

CHECKPOINT_SECONDS = 60.0
"""A checkpoint is written where a shard begins, when the last one is older."""


class Checkpoint:
    """Of one SAE's evaluation, in the scratch folder of the draft."""

    def __init__(self, draft: Draft, sae: str) -> None:
        self._draft = draft
        self._name = f"{draft.scratch.name}/evaluate-{sae}.safetensors"  # children share the folder
        self._saved: dict[str, Tensor] = {}
        if draft.has(self._name):
            # copied: as they lie in the file they are not aligned as torch aligns, and products then differ in their last bits
            self._saved = {name: tensor.clone() for name, tensor in load_file(draft.local(self._name)).items()}
        self._written = time.monotonic()
        at = self._saved.pop("at", torch.zeros(2, dtype=torch.int64)).tolist()
        self.n_passes: int = at[0]
        """Passes that are done."""
        self.shard: int = at[1]
        """Shards that are done of the pass after them."""

    def restore(self, state: dict[str, Any]) -> None:
        """Put what was saved into `state`, which is made as it was then; once: what comes to `state` later is put there by a later call."""
        for name, holder, key in list(_iter_places(state)):
            if name in self._saved:
                _put(holder, key, self._saved.pop(name))

    def reach(self, n_passes: int, shard: int, state: dict[str, Any]) -> None:
        """So many passes, and so many shards of the next, are in `state`."""
        if (n_passes, shard) == (self.n_passes, self.shard) or time.monotonic() - self._written <= CHECKPOINT_SECONDS:
            return
        tensors = {name: _tensor(_get(holder, key)) for name, holder, key in _iter_places(state) if _get(holder, key) is not None}
        with self._draft.write_file(self._name) as path:
            save_file({"at": torch.tensor([n_passes, shard]), **tensors}, path)
        self.n_passes, self.shard, self._written = n_passes, shard, time.monotonic()

    def remove(self) -> None:
        """It is needed no more."""
        self._draft.remove(self._name)


def _iter_places(holder: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, holder and key of all that is state."""
    for key, value in _items(holder):
        name = f"{prefix}{key}"
        if value is None or isinstance(value, Tensor | np.ndarray | int | float):
            yield name, holder, key
        else:
            yield from _iter_places(value, f"{name}/")


def _items(holder: Any) -> list[tuple[Any, Any]]:
    if isinstance(holder, dict):
        return list(holder.items())
    if isinstance(holder, list):
        return list(enumerate(holder))
    if type(holder).__module__.startswith("ommatid."):
        return [(key, value) for key, value in vars(holder).items() if not key.startswith("_")]
    return []


def _get(holder: Any, key: Any) -> Any:
    return holder[key] if isinstance(holder, dict | list) else getattr(holder, key)


def _put(holder: Any, key: Any, saved: Tensor) -> None:
    old = _get(holder, key)
    if isinstance(old, np.ndarray):
        old[...] = saved.numpy()
        return
    value = type(old)(saved.item()) if isinstance(old, int | float) else saved
    if isinstance(holder, dict | list):
        holder[key] = value
    else:
        setattr(holder, key, value)


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.contiguous()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
