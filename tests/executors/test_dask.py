"""Proves on a real Dask scheduler with two worker processes that every shard is made, whatever happens to the workers."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from ommatid.config.extract import DaskExecutor
from ommatid.errors import ArtefactError, ExecutorError
from ommatid.executors import dask, run, workers
from support.jobs import BreakJob, Counted, KillJob, KillOnceJob, NestedJob, RefuseJob, StubbornJob, WriteJob, made
from support.processes import HANG_SECONDS, TESTS, started, wait_for
from support.servers import dask_scheduler, dask_workers, free_port


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskExecutor]:
    with dask_scheduler() as address, dask_workers(address, tmp_path_factory.mktemp("workers")):
        with Client(address, timeout=HANG_SECONDS) as client:
            client.wait_for_workers(2, HANG_SECONDS)
        yield DaskExecutor(kind="dask", address=address, workers=1)


def test_every_shard_is_made_once_by_one_of_two_workers_one_at_a_time(cluster: DaskExecutor, tmp_path: Path) -> None:
    done: list[int] = []
    run(cluster, NestedJob(str(tmp_path), n_workers=2), range(4), done.append)
    facts = made(tmp_path)
    assert sorted(done) == sorted(facts) == list(range(4))
    assert len({fact["pid"] for fact in facts.values()} - {os.getpid()}) == 2


def test_the_shard_of_a_killed_worker_is_made_by_another(cluster: DaskExecutor, tmp_path: Path) -> None:
    done: list[int] = []
    job = KillOnceJob(str(tmp_path))
    run(cluster, job, range(6), done.append)
    assert sorted(done) == sorted(made(tmp_path)) == list(range(6))
    assert job.attempts(3) == 2


def test_a_shard_that_kills_every_worker_is_named(cluster: DaskExecutor, tmp_path: Path) -> None:
    with pytest.raises(ExecutorError, match=r"shard \d: failed 4 times, .* its worker died \(.*127\.0\.0\.1.*are kept"):
        run(cluster, KillJob(str(tmp_path)), range(3, 5), lambda shard: None)


def test_an_error_for_the_user_arrives_unchanged(cluster: DaskExecutor, tmp_path: Path) -> None:
    job = RefuseJob(str(tmp_path))
    with pytest.raises(ArtefactError, match=r"^images: image 5 cannot be decoded any more$"):
        run(cluster, job, range(6), lambda shard: None)
    assert job.attempts(3) == 3


def test_a_transient_error_does_no_harm(cluster: DaskExecutor, tmp_path: Path) -> None:
    run(cluster, RefuseJob(str(tmp_path), times=2), range(6), lambda shard: None)
    assert sorted(made(tmp_path)) == list(range(6))


def test_an_internal_error_says_where_it_happened(cluster: DaskExecutor, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="planted") as caught:
        run(cluster, BreakJob(str(tmp_path)), range(6), lambda shard: None)
    assert any("at shard 3" in note and "in disturb" in note for note in caught.value.__notes__)
    with pytest.raises(RuntimeError, match=r"(?s)shard 3.*Stubborn: planted"):
        run(cluster, StubbornJob(str(tmp_path)), range(6), lambda shard: None)


def test_few_shards_are_in_flight(cluster: DaskExecutor, tmp_path: Path) -> None:
    shards = Counted(60)
    run(cluster, WriteJob(str(tmp_path)), shards, shards.finish)
    assert len(made(tmp_path)) == shards.done == 60
    assert 2 <= shards.most <= 4


def test_a_scheduler_that_does_not_answer_is_named_at_once() -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(ExecutorError, match=rf"executor.address: no Dask scheduler answers at {address}.*start one"):
        run(DaskExecutor(kind="dask", address=address, workers=1), print, [1], lambda shard: None)
    with pytest.raises(ExecutorError, match="no Dask scheduler answers at nonsense://x"):
        run(DaskExecutor(kind="dask", address="nonsense://x", workers=1), print, [1], lambda shard: None)


def test_the_run_gives_up_without_workers_but_waits_for_late_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask, "_SECONDS_WITHOUT_WORKERS", 0.5)
    with dask_scheduler() as address:
        params = DaskExecutor(kind="dask", address=address, workers=1)
        with pytest.raises(ExecutorError, match=rf"{address}: the Dask scheduler has had no worker for 0.5 seconds; start some"):
            run(params, WriteJob(str(tmp_path)), range(3), lambda shard: None)
        monkeypatch.setattr(dask, "_SECONDS_WITHOUT_WORKERS", HANG_SECONDS)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(run, params, WriteJob(str(tmp_path)), range(3), lambda shard: None)
            time.sleep(1)
            with dask_workers(address, tmp_path):
                waiting.result()
    assert len(made(tmp_path)) == 3


def test_a_client_that_does_not_start_in_time_is_made_again(cluster: DaskExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, late = dask.Client, [True, True]

    def start(*args: Any, **options: Any) -> Any:
        assert not (late and late.pop()), "as distributed asserts of its event loop"
        return make(*args, **options)

    monkeypatch.setattr(dask, "Client", start)
    run(cluster, WriteJob(str(tmp_path)), range(3), lambda shard: None)
    assert len(made(tmp_path)) == 3
    late += [True] * dask._TRIES
    with pytest.raises(ExecutorError, match=r"Dask's client did not start in 3 tries, .* too busy; run the stage again"):
        run(cluster, WriteJob(str(tmp_path)), range(3), lambda shard: None)


def test_a_scheduler_that_goes_away_is_named(tmp_path: Path) -> None:
    with ExitStack() as scheduling, ExitStack() as working:
        address = scheduling.enter_context(dask_scheduler())
        working.enter_context(dask_workers(address, tmp_path))
        params = DaskExecutor(kind="dask", address=address, workers=1)
        with pytest.raises(ExecutorError, match=rf"{address}: the Dask scheduler has gone"):
            run(params, WriteJob(str(tmp_path), seconds=0.2), range(1000), lambda shard: scheduling.close())


@pytest.mark.parametrize("who", ["a worker", "the scheduler"])
def test_a_cluster_without_ommatid_is_an_error_that_says_so(who: str, tmp_path: Path) -> None:
    (tmp_path / "old/ommatid").mkdir(parents=True)
    (tmp_path / "old/ommatid/__init__.py").touch()
    old = str(tmp_path / "old")
    with ExitStack() as stack:
        address = stack.enter_context(dask_scheduler(old if who == "the scheduler" else ""))
        stack.enter_context(dask_workers(address, tmp_path, old if who == "a worker" else str(TESTS)))
        with Client(address, timeout=HANG_SECONDS) as client:
            client.wait_for_workers(2, HANG_SECONDS)
        with pytest.raises(ExecutorError, match=rf"{address}: {who} of the Dask cluster cannot import Ommatid \(.*ommatid.executors"):
            run(DaskExecutor(kind="dask", address=address, workers=1), WriteJob(str(tmp_path)), range(3), lambda shard: None)


def test_workers_of_other_versions_are_refused(cluster: DaskExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = workers._versions() | {"torch": "1.0"}
    monkeypatch.setattr(workers, "_versions", lambda: versions)
    with pytest.raises(ExecutorError, match=r"worker tcp://127.0.0.1:\d+: has torch .* instead of 1.0"):
        run(cluster, WriteJob(str(tmp_path)), range(3), lambda shard: None)


def test_without_an_address_a_cluster_is_started_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    before = dict(os.environ)
    others = started()
    job = KillOnceJob(str(tmp_path))
    done: list[int] = []
    run(DaskExecutor(kind="dask", address=None, workers=2), job, range(6), done.append)
    facts = made(tmp_path)
    assert sorted(done) == sorted(facts) == list(range(6))
    assert job.attempts(3) == 2
    assert {fact["OMP_NUM_THREADS"] for fact in facts.values()} == {"3"}
    assert {fact["GOMP_SPINCOUNT"] for fact in facts.values()} == {"1000"}
    assert os.getpid() not in {fact["pid"] for fact in facts.values()}
    assert os.environ.keys() - before.keys() <= {"__DASK_PARENT_PID"}
    assert before.items() <= os.environ.items()
    wait_for(lambda: started() <= others, "the cluster to end")
