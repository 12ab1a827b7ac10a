"""Two passes over the evaluation tokens, shard by shard: what they leave, and how they go on after a kill.

A checkpoint is a walk over what accumulates: tensors, arrays and numbers of objects of `metrics` and `evaluate`, and of the dicts and
lists that hold them. So a new accumulator need not be named to be in it; what else an object refers to, such as an SAE, is made anew.
"""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ommatid.config import EvaluateParams
from ommatid.evaluate.batches import Images, iter_images
from ommatid.evaluate.classes import Pooled, ProbeImages
from ommatid.evaluate.dictionaries import make_subjects
from ommatid.evaluate.firings import Firings, Heat, choose_examples
from ommatid.events import Listener
from ommatid.sae.model import SAE
from ommatid.store import Artefact, Draft

CHECKPOINT_SECONDS = 60.0
"""A checkpoint is written where a shard begins, when the last one is older."""
ACCUMULATING = ("ommatid.metrics.", "ommatid.evaluate.")
"""Modules whose objects are walked."""


class Checkpoint:
    """Of one SAE's evaluation, in the scratch folder of the draft."""

    def __init__(self, draft: Draft, sae: str) -> None:
        self._draft = draft
        self._name = f"{draft.scratch.name}/evaluate-{sae}.safetensors"  # the drafts of several SAEs share the folder
        self._saved: dict[str, Tensor] = {}
        if draft.has(self._name) and all([draft.has(name) for name in draft.names()]):  # it tells of firings in them
            # copied: as they lie in the file they are not aligned as torch aligns, and products then differ in their last bits
            self._saved = {name: tensor.clone() for name, tensor in load_file(draft.local(self._name)).items()}
        self._written = time.monotonic()
        at = self._saved.pop("at", torch.zeros(2, dtype=torch.int64)).tolist()
        self.n_passes: int = at[0]
        """Passes that are done."""
        self.shard: int = at[1]
        """Shards that are done of the pass after them."""

    def restore(self, state: dict[str, Any]) -> None:
        """Put what was saved into `state`, which must hold as many objects as then; once, so what accumulates afterwards stays."""
        for name, holder, key in list(_iter_places(state, set())):
            if name in self._saved:
                _put(holder, key, self._saved.pop(name))

    def reach(self, n_passes: int, shard: int, state: dict[str, Any]) -> None:
        """So many passes, and so many shards of the next, are in `state`."""
        if (n_passes, shard) == (self.n_passes, self.shard) or time.monotonic() - self._written <= CHECKPOINT_SECONDS:
            return
        values = {name: _get(holder, key) for name, holder, key in _iter_places(state, set())}
        tensors = _unshared({name: _tensor(value) for name, value in values.items() if value is not None})
        with self._draft.write_file(self._name) as path:
            save_file({"at": torch.tensor([n_passes, shard]), **tensors}, path)
        self.n_passes, self.shard, self._written = n_passes, shard, time.monotonic()

    def remove(self) -> None:
        """It is needed no more."""
        self._draft.remove(self._name)


def _iter_places(holder: Any, seen: set[int], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, holder and key of every value; an object that several refer to is walked once."""
    seen.add(id(holder))
    for key, value in _items(holder):
        name = f"{prefix}{key}"
        if value is None or isinstance(value, Tensor | np.ndarray | int | float):
            yield name, holder, key
        elif id(value) not in seen:
            yield from _iter_places(value, seen, f"{name}/")


def _items(holder: Any) -> list[tuple[Any, Any]]:
    if isinstance(holder, dict):
        return list(holder.items())
    if isinstance(holder, list):
        return list(enumerate(holder))
    return list(vars(holder).items()) if type(holder).__module__.startswith(ACCUMULATING) else []


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
        object.__setattr__(holder, key, value)  # also of results, which are frozen


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.contiguous()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, a copy where one shares memory with another: safetensors takes no such."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found


class Passes:
    """The first pass accumulates, the second gives the intervals and the heat maps of the examples that were chosen in between."""

    def __init__(
        self, params: EvaluateParams, inputs: Mapping[str, Artefact], sae: SAE, probed: ProbeImages, draft: Draft, on_event: Listener
    ) -> None:
        self._params = params
        self._inputs = inputs
        self._sae = sae
        self._draft = draft
        self._on_event = on_event
        self._checkpoint = Checkpoint(draft, inputs["train"].summary["sae"])
        self.subjects = make_subjects(sae, inputs["extract"], params)
        """The SAE first."""
        self.firings = Firings(draft, inputs["train"].summary["sae"])
        """Of the SAE."""
        self.pooled = Pooled(probed, sae.config.d_model)
        """Activations for the probes."""
        self.heat: Heat
        """Of the examples."""

    def run(self) -> None:
        """Make both, or what a run that was killed left of them."""
        if self._checkpoint.n_passes == 0:
            self._checkpoint.restore(self._state())
            self._run_first()
        else:
            self._checkpoint.restore({"firings": self.firings})
        examples = choose_examples(self._draft, self.firings, self._params)
        self.heat = Heat(examples, self._inputs["extract"].summary["grid"])
        for subject in self.subjects:
            subject.begin_second_pass()
        self._checkpoint.restore(self._state())  # after the second pass has begun: of nothing, where the first is not made again
        self._run_second()

    def forget(self) -> None:
        """Drop the checkpoint: all is written."""
        self._checkpoint.remove()

    def _run_first(self) -> None:
        for batch in self._iter(0, self._inputs.get("target"), "evaluate images, first pass"):
            self.pooled.add(batch)
            for subject in self.subjects:
                acts = subject.add(batch)
                if subject.name == "sae":
                    self.firings.add(batch.numbers, acts)
        self.firings.close()

    def _run_second(self) -> None:
        for batch in self._iter(1, None, "evaluate images, second pass"):
            for subject in self.subjects:
                acts = subject.add_again(batch)
                if subject.name == "sae":
                    self.heat.add(batch.numbers, acts)
        for subject in self.subjects:
            subject.end()

    def _iter(self, n: int, target: Artefact | None, what: str) -> Iterator[Images]:
        """What is left of a pass."""
        first = self._checkpoint.shard if self._checkpoint.n_passes == n else 0
        n_images = self._inputs["images"].summary["n_eval"]
        for batch in iter_images(self._inputs["extract"], target, self._sae.n_latents, n_images, what, self._on_event, first):
            self._checkpoint.reach(n, batch.shard, self._state())
            yield batch

    def _state(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}
