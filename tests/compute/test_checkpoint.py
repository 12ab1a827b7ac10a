"""Proves that a checkpoint gives back what was saved, and nothing that came after it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ommatid.compute.checkpoint import Accumulator, Checkpoint, flatten, restore
from ommatid.store import open_draft


class Inner(Accumulator):
    STATE = ("n", "sum")

    def __init__(self) -> None:
        self.n = 0
        self.sum: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> None:
        self.n += len(x)
        self.sum = x.sum(0) if self.sum is None else self.sum + x.sum(0)


class Outer(Accumulator):
    STATE = ("each", "of", "mean", "waiting", "view", "later")

    def __init__(self) -> None:
        self.each = [Inner(), Inner()]
        self.of = {"a/b": Inner()}
        self.mean = 0.5
        self.waiting = np.zeros(3)
        self.view = torch.zeros(2, 3)[:, 1]
        self.later: Inner | None = None
        self.made = "not part of the state"


def test_a_checkpoint_gives_back_what_was_saved(tmp_path: Path) -> None:
    saved = Outer()
    saved.each[1].add(torch.ones(4, 2))
    saved.of["a/b"].add(torch.ones(1, 2))
    saved.mean, saved.waiting[1], saved.view[0] = 0.25, 7.0, 3.0
    with open_draft(tmp_path / "made", "made", {}, {}) as draft:
        place = Checkpoint(draft, "scratch/one.safetensors")
        assert place.load() == {}
        place.save({"outer": saved, "shared": [saved.view, saved.view]})
        found = place.load()
        fresh = Outer()
        inner = fresh.each[1]
        restore({"outer": fresh}, found)
        assert inner is fresh.each[1] and (inner.n, fresh.each[0].n, fresh.each[0].sum) == (4, 0, None)
        inner.add(torch.ones(1, 2))  # what accumulates afterwards goes on from there
        assert inner.sum is not None and inner.sum.tolist() == [5.0, 5.0]
        assert (fresh.of["a/b"].n, fresh.mean, fresh.waiting.tolist(), fresh.view.tolist()) == (1, 0.25, [0, 7, 0], [3, 0])
        assert all(tensor.data_ptr() % 64 == 0 for tensor in found.values() if tensor.numel())
        place.remove()
        assert place.load() == {}


def test_a_value_that_cannot_be_saved_is_refused() -> None:
    with pytest.raises(AssertionError, match="made: a str cannot be saved as state"):
        flatten({"made": "text"})
