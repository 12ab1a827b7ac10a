"""Proves on a real Ray cluster that every shard is made, whatever happens to the worker processes."""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ommatid.config.extract import RayExecutor
from ommatid.errors import ArtefactError, ExecutorError
from ommatid.executors import ray, run, workers
from support.jobs import BreakJob, Counted, KillJob, KillOnceJob, NestedJob, RefuseJob, StubbornJob, WriteJob, made
from support.processes import HANG_SECONDS, TESTS, started, wait_for
from support.servers import free_port, ray_cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayExecutor]:
    with ray_cluster(tmp_path_factory.mktemp("ray") / "log") as params:
        yield params


def test_every_shard_is_made_once_by_one_of_two_workers(cluster: RayExecutor, tmp_path: Path) -> None:
    done: list[int] = []
    run(cluster, NestedJob(str(tmp_path), n_workers=2), range(6), done.append)
    facts = made(tmp_path)
    assert sorted(done) == sorted(facts) == list(range(6))
    assert len({fact["pid"] for fact in facts.values()} - {os.getpid()}) == 2


def test_the_shard_of_a_killed_worker_is_made_by_another(cluster: RayExecutor, tmp_path: Path) -> None:
    done: list[int] = []
    job = KillOnceJob(str(tmp_path))
    run(cluster, job, range(20), done.append)
    facts = made(tmp_path)
    assert sorted(done) == sorted(facts) == list(range(20))
    assert job.attempts(3) == 2


def test_a_shard_that_kills_every_worker_is_named(cluster: RayExecutor, tmp_path: Path) -> None:
    job = KillJob(str(tmp_path))
    with pytest.raises(ExecutorError, match=r"shard 3: failed 3 times, .* its worker died \(.*worker process has died.*are kept$"):
        run(cluster, job, range(6), lambda shard: None)
    assert job.attempts(3) == 3


def test_an_error_for_the_user_arrives_unchanged(cluster: RayExecutor, tmp_path: Path) -> None:
    job = RefuseJob(str(tmp_path))
    with pytest.raises(ArtefactError, match=r"^images: image 5 cannot be decoded any more$") as caught:
        run(cluster, job, range(6), lambda shard: None)
    assert type(caught.value) is ArtefactError
    assert job.attempts(3) == 3


def test_a_transient_error_does_no_harm(cluster: RayExecutor, tmp_path: Path) -> None:
    run(cluster, RefuseJob(str(tmp_path), times=2), range(6), lambda shard: None)
    assert sorted(made(tmp_path)) == list(range(6))


def test_an_internal_error_says_where_it_happened(cluster: RayExecutor, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="planted") as caught:
        run(cluster, BreakJob(str(tmp_path)), range(6), lambda shard: None)
    (note,) = caught.value.__notes__
    assert "at shard 3" in note and "in disturb" in note
    with pytest.raises(RuntimeError, match=r"(?s)shard 3.*Stubborn: planted"):
        run(cluster, StubbornJob(str(tmp_path)), range(6), lambda shard: None)


def test_only_as_many_shards_are_taken_as_there_are_workers(cluster: RayExecutor, tmp_path: Path) -> None:
    shards = Counted(30)
    run(cluster, WriteJob(str(tmp_path)), shards, shards.finish)
    assert len(made(tmp_path)) == shards.done == 30
    assert shards.most <= 2


def test_workers_of_other_versions_are_refused(cluster: RayExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = workers._versions() | {"torch": "1.0"}
    monkeypatch.setattr(workers, "_versions", lambda: versions)
    with pytest.raises(ExecutorError, match=r"worker [\d.]+: has torch .* instead of 1.0"):
        run(cluster, WriteJob(str(tmp_path)), range(3), lambda shard: None)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_does_not_answer_is_named_at_once(scheme: str) -> None:
    address = f"{scheme}127.0.0.1:{free_port()}"
    began = time.monotonic()
    with pytest.raises(ExecutorError, match=rf"executor.address: no Ray cluster answers at {address}.*start one"):
        run(RayExecutor(kind="ray", address=address, workers=1), print, [1], lambda shard: None)
    assert time.monotonic() - began < HANG_SECONDS / 10  # Ray itself tries for minutes


def test_the_run_gives_up_if_no_worker_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "_SECONDS_WITHOUT_WORKERS", 1)
    problem = "the Ray cluster has had no room for a worker for 1 seconds"
    with ray_cluster(tmp_path / "log", n_places=0) as params, pytest.raises(ExecutorError, match=problem):
        run(params, WriteJob(str(tmp_path)), range(3), lambda shard: None)


def test_a_cluster_without_ommatid_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "old/ommatid").mkdir(parents=True)
    (tmp_path / "old/ommatid/__init__.py").touch()
    problem = r"a worker cannot start \(.*ommatid[.].*'\); install the same versions on all nodes as here"
    with ray_cluster(tmp_path / "log", path=f"{tmp_path / 'old'}:{TESTS}") as params, pytest.raises(ExecutorError, match=problem):
        run(params, WriteJob(str(tmp_path)), range(3), lambda shard: None)


def test_without_an_address_a_cluster_is_started_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    before = dict(os.environ)
    level = logging.getLogger("ray").level
    others = started()
    job = KillOnceJob(str(tmp_path))
    done: list[int] = []
    run(RayExecutor(kind="ray", address=None, workers=2), job, range(6), done.append)
    facts = made(tmp_path)
    assert sorted(done) == sorted(facts) == list(range(6))
    assert job.attempts(3) == 2
    assert {fact["OMP_NUM_THREADS"] for fact in facts.values()} == {"3"}
    assert {fact["GOMP_SPINCOUNT"] for fact in facts.values()} == {"1000"}
    assert len({fact["pid"] for fact in facts.values()} - {os.getpid()}) >= 2
    assert dict(os.environ) == before
    assert logging.getLogger("ray").level == level
    wait_for(lambda: started() <= others, "the cluster to end")
