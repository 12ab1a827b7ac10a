"""Proves that training batches hold every row once per epoch, mix images, and depend on seed, epoch and step alone."""

import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from ommatid.activations.batches import iter_batches
from ommatid.activations.mmap import map_column
from ommatid.compute.prefetch import prefetch
from ommatid.store import Artefact
from support.activations import N_IMAGES, N_TOKENS, make_activations


@pytest.fixture(scope="module")
def activations(tmp_path_factory: pytest.TempPathFactory) -> Artefact:
    return make_activations(tmp_path_factory.mktemp("reader"))


def epoch(activations: Artefact, batch_size: int, number: int = 0, seed: int = 0) -> list[torch.Tensor]:
    n = 2 * N_IMAGES * N_TOKENS // batch_size
    return [batch.x for batch in islice(iter_batches(activations, batch_size, seed, number * n), n)]


@pytest.mark.parametrize("batch_size", [7, 64, 150, 290, 3000])
def test_an_epoch_has_every_row_once_except_an_incomplete_batch(activations: Artefact, batch_size: int) -> None:
    batches = epoch(activations, batch_size)
    assert all(batch.shape == (batch_size, 2) and batch.dtype == torch.float16 for batch in batches)
    rows = torch.cat(batches).unique(dim=0)
    assert len(rows) == 4000 // batch_size * batch_size


def test_nearly_all_rows_of_a_batch_are_of_different_images(activations: Artefact) -> None:
    for number in range(3):
        shares = [len(batch[:, 0].unique()) / len(batch) for batch in epoch(activations, 290, number)]
        assert sorted(shares)[1] == 1.0  # all but one that collects the ends of the shards
        assert np.mean(shares) >= 0.95


def test_shards_are_interleaved_throughout_an_epoch(activations: Artefact) -> None:
    for number in range(3):
        shares = [float((batch[:, 0] < N_IMAGES).double().mean()) for batch in epoch(activations, 64, number)]
        assert all(0.2 < np.mean(shares[at : at + 8]) < 0.8 for at in range(len(shares) - 10))


def test_rows_of_few_images_are_shuffled_too(tmp_path: Path) -> None:
    batches = epoch(make_activations(tmp_path, window_rows=20), 500)
    shares = [len(batch[:, 0].unique()) / 500 for batch in batches]
    assert min(shares) > 0.3  # ordered: 0.2
    assert len(torch.cat(batches).unique(dim=0)) == 4000


def test_the_order_depends_on_epoch_and_seed_and_resumes_at_any_step(activations: Artefact) -> None:
    first = epoch(activations, 64)
    assert all(torch.equal(a, b) for a, b in zip(first, epoch(activations, 64), strict=True))
    for other in (epoch(activations, 64, number=1), epoch(activations, 64, seed=1)):
        sets = [{tuple(row) for row in batches[0].tolist()} for batches in (first, other)]
        assert len(sets[0] & sets[1]) < 32
    for start in (1, 30, 61, 62, 90):
        resumed = next(iter_batches(activations, 64, 0, start))
        assert torch.equal(resumed.x, next(islice(iter_batches(activations, 64, 0), start, None)).x)


def test_mapped_and_read_batches_are_equal(activations: Artefact, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = epoch(activations, 64)
    with activations.open_part("train-00000.parquet") as file:
        path = activations.local("train-00000.parquet")
        assert path is not None
        assert all(map_column(path, file, group, 5, 4) is not None for group in range(file.num_row_groups))
    monkeypatch.setattr(Artefact, "local", lambda self, name: None)
    assert all(torch.equal(a, b) for a, b in zip(mapped, epoch(activations, 64), strict=True))


def test_prefetching_ends_with_its_consumer_and_passes_on_errors() -> None:
    before = threading.active_count()

    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("broken")

    assert list(islice(prefetch(iter(range(100)), 2), 3)) == [0, 1, 2]
    made = prefetch(items(), 1)
    assert [next(made), next(made)] == [1, 2]
    with pytest.raises(ValueError, match="broken"):
        next(made)
    assert threading.active_count() == before
