"""Proves that an extraction has the same bytes whichever executor runs its shards, and whichever worker dies in the middle."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client

from ommatid.config import ExtractParams
from ommatid.events import Event, Listener, Reused, ignore
from ommatid.executors import local
from ommatid.extract import plan
from ommatid.extract.stage import extract
from ommatid.images import dataset
from ommatid.store import Artefact, open_draft
from support.models import save_tiny_clip
from support.processes import HANG_SECONDS, command_of
from support.servers import dask_scheduler, dask_workers, ray_cluster
from support.study import make_test_params
from support.tiles import make_images_artefact

N_IMAGES = 180
MODEL = {
    "model": {"kind": "clip", "path": "models/clip"},
    "judge": {"kind": "transformers", "path": "models/judge"},
    "hookpoints": ["vision.blocks.0.attn", "vision.blocks.2"],
    "tokens": "all",
    "sample": 3,
    "batch_size": 16,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Artefact]:
    """Images in six shards, whose size only the driver knows. Paths are relative, although workers run in another folder."""
    root = tmp_path_factory.mktemp("checkout")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in ("clip", "judge"):
            save_tiny_clip(Path("models", name))
        patch.setitem(dataset.PARQUET, "row_group_size", 10)
        patch.setattr(plan, "IMAGES_PER_SHARD", 30)
        yield make_images_artefact(Path("data"), N_IMAGES)


@pytest.fixture(scope="module")
def expected(images: Artefact) -> Artefact:
    """The extraction made by this process."""
    return make(images, {"kind": "local"})


def make(images: Artefact, executor: dict[str, Any], on_event: Listener = ignore) -> Artefact:
    values = make_test_params().model_dump(mode="json")["extract"] | MODEL | {"executor": executor}
    params, place = ExtractParams.model_validate(values), Path("data", executor["kind"], "activations")
    with open_draft(place, "extraction", params.identity(), {"images": images}) as draft:
        extract(params, {"images": images}, draft, on_event)
        return draft.publish(place)


def check(made: Artefact, expected: Artefact) -> None:
    """Check that manifests are equal, and that the files match them."""
    for name in (".", *expected.children):
        assert (made.path / name / "manifest.json").read_bytes() == (expected.path / name / "manifest.json").read_bytes()
    assert made.manifest.summary["n_shards"] == 6
    made.verify()


class KillOne:
    """Kills one of the workers when the first shard is done and the others are in progress."""

    def __init__(self, find: Callable[[], list[int]]) -> None:
        self._find = find
        self.killed: int | None = None

    def __call__(self, event: Any) -> None:
        if self.killed is None:
            self.killed = self._find()[0]
            os.kill(self.killed, signal.SIGKILL)


def find(words: str) -> list[int]:
    """Return the descendants of this process with some words in their command line."""
    return [child.pid for child in psutil.Process().children(recursive=True) if words in command_of(child)]


def test_two_processes_one_of_which_is_killed_write_the_same_bytes(
    images: Artefact, expected: Artefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_gpus", lambda: ["", ""])
    kill = KillOne(lambda: find("spawn_main"))
    check(make(images, {"kind": "local"}, kill), expected)
    assert kill.killed


def test_what_workers_computed_is_found_by_this_process(
    images: Artefact, expected: Artefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMMATID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMMATID_CACHE_GB", "0.1")
    monkeypatch.setattr(local, "_gpus", lambda: ["", ""])
    check(make(images, {"kind": "local"}), expected)
    monkeypatch.setattr(local, "_gpus", lambda: [])
    heard: list[Event] = []
    check(make(images, {"kind": "local"}, heard.append), expected)
    assert [event for event in heard if isinstance(event, Reused)] == [Reused("images", N_IMAGES, 0)]


def test_two_dask_workers_one_of_which_is_killed_write_the_same_bytes(images: Artefact, expected: Artefact, tmp_path: Path) -> None:
    with dask_scheduler() as address, dask_workers(address, tmp_path), Client(address) as client:
        client.wait_for_workers(2, HANG_SECONDS)
        answers: Any = client.run(os.getpid)
        kill = KillOne(lambda: list(answers.values()))
        check(make(images, {"kind": "dask", "address": address, "workers": 1}, kill), expected)
    assert kill.killed


def test_two_ray_workers_one_of_which_is_killed_write_the_same_bytes(images: Artefact, expected: Artefact, tmp_path: Path) -> None:
    with ray_cluster(tmp_path / "log") as params:
        kill = KillOne(lambda: find("ray::_Worker"))
        check(make(images, params.model_dump(), kill), expected)
    assert kill.killed
