"""Proves that this machine makes every shard once, in one process or several, and that no process is left behind."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ommatid.config.extract import LocalExecutor
from ommatid.errors import ArtefactError, ExecutorError
from ommatid.executors import local, run
from ommatid.executors.workers import Driver, environment, thread_settings
from support import processes
from support.jobs import BreakJob, KillJob, KillOnceJob, NestedJob, RefuseJob, SlowJob, StubbornJob, WriteJob, made
from support.processes import HANG_SECONDS, started

LOCAL = LocalExecutor(kind="local")
DEVICES = ("5", "GPU-7")
"""Devices to assign; assigning them needs no GPU."""


def test_without_several_gpus_shards_are_made_here_in_order(tmp_path: Path) -> None:
    done: list[int] = []
    run(LocalExecutor(kind="local"), WriteJob(str(tmp_path)), [4, 2, 3], done.append)
    assert done == [4, 2, 3]
    assert {fact["pid"] for fact in made(tmp_path).values()} == {os.getpid()}


def test_an_error_here_is_raised_at_once(tmp_path: Path) -> None:
    job = RefuseJob(str(tmp_path))
    with pytest.raises(ArtefactError, match="image 5"):
        run(LocalExecutor(kind="local"), job, range(5), lambda shard: None)
    assert job.attempts(3) == 1


def test_each_gpu_has_a_process_and_they_share_the_cores(tmp_path: Path) -> None:
    others = started()
    done: list[int] = []
    local.run(LOCAL, NestedJob(str(tmp_path), n_workers=2), range(8), done.append, DEVICES)
    facts = made(tmp_path)
    assert sorted(done) == sorted(facts) == list(range(8))
    assert {fact["CUDA_VISIBLE_DEVICES"] for fact in facts.values()} == set(DEVICES)
    assert len({fact["pid"] for fact in facts.values()} - {os.getpid()}) == 2
    assert {fact["OMP_NUM_THREADS"] for fact in facts.values()} == {"1"}
    assert {fact["GOMP_SPINCOUNT"] for fact in facts.values()} == {"1000"}
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert started() <= others


def test_there_are_no_more_processes_than_shards(tmp_path: Path) -> None:
    local.run(LOCAL, WriteJob(str(tmp_path)), [7], lambda shard: None, DEVICES)
    assert list(made(tmp_path)) == [7]


def test_the_shard_of_a_killed_process_is_made_by_another(tmp_path: Path) -> None:
    others = started()
    done: list[int] = []
    job = KillOnceJob(str(tmp_path))
    local.run(LOCAL, job, range(6), done.append, DEVICES)
    facts = made(tmp_path)
    assert sorted(done) == sorted(facts) == list(range(6))
    assert job.attempts(3) == 2
    assert {fact["CUDA_VISIBLE_DEVICES"] for fact in facts.values()} == set(DEVICES)
    assert started() <= others


def test_a_shard_that_kills_every_process_is_named(tmp_path: Path) -> None:
    others = started()
    job = KillJob(str(tmp_path))
    with pytest.raises(ExecutorError, match=r"shard 3: failed 3 times, .* its worker died \(SIGKILL\).*batch_size.*are kept"):
        local.run(LOCAL, job, range(6), lambda shard: None, DEVICES)
    assert job.attempts(3) == 3
    assert started() <= others


def test_an_error_for_the_user_arrives_unchanged(tmp_path: Path) -> None:
    job = RefuseJob(str(tmp_path))
    with pytest.raises(ArtefactError, match=r"^images: image 5 cannot be decoded any more$"):
        local.run(LOCAL, job, range(6), lambda shard: None, DEVICES)
    assert job.attempts(3) == 3


def test_a_transient_error_does_no_harm(tmp_path: Path) -> None:
    local.run(LOCAL, RefuseJob(str(tmp_path), times=2), range(6), lambda shard: None, DEVICES)
    assert sorted(made(tmp_path)) == list(range(6))


def test_an_internal_error_says_where_it_happened(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        local.run(LOCAL, BreakJob(str(tmp_path)), [2, 3], lambda shard: None, DEVICES)
    (note,) = caught.value.__notes__
    assert "at shard 3" in note and "in disturb" in note


def test_an_error_that_cannot_be_pickled_is_reported_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)shard 3.*Stubborn: planted"):
        local.run(LOCAL, StubbornJob(str(tmp_path)), [2, 3], lambda shard: None, DEVICES)


def test_an_error_ends_the_other_workers(tmp_path: Path) -> None:
    others = started()

    def fail(shard: int) -> None:
        raise KeyError(shard)

    began = time.monotonic()
    with pytest.raises(KeyError):
        local.run(LOCAL, SlowJob(str(tmp_path)), [0, 3600], fail, DEVICES)
    assert time.monotonic() - began < HANG_SECONDS
    assert started() <= others


DRIVER = """
import sys
from support.jobs import WriteJob
from ommatid.config.extract import LocalExecutor
from ommatid.executors import local

if __name__ == "__main__":
    job = WriteJob(sys.argv[1], seconds=0.2)
    local.run(LocalExecutor(kind="local"), job, range(10_000), lambda shard: print(shard, flush=True), ["", ""])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_its_driver(tmp_path: Path, number: signal.Signals, driver: processes.Driver) -> None:
    driver.start(DRIVER, tmp_path)
    driver.end(number)


def test_all_processes_together_use_no_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [thread_settings(n)["OMP_NUM_THREADS"] for n in (1, 3, 16, 100)] == ["16", "5", "1", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [thread_settings(n)["OMP_NUM_THREADS"] for n in (1, 16)] == ["2", "1"]


def test_the_environment_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMMATID_A", "1")
    monkeypatch.delenv("OMMATID_B", raising=False)
    with environment({"OMMATID_A": "2", "OMMATID_B": "3"}):
        assert (os.environ["OMMATID_A"], os.environ["OMMATID_B"]) == ("2", "3")
    assert os.environ["OMMATID_A"] == "1"
    assert "OMMATID_B" not in os.environ


def test_workers_with_other_libraries_are_refused_by_name() -> None:
    here = Driver.here()
    with (
        pytest.raises(ExecutorError, match=r"worker tcp://x: has torch [\d.]+ instead of 1\.0;"),
        replace(here, versions={**here.versions, "torch": "1.0"}).enter("tcp://x"),
    ):
        raise AssertionError


def test_workers_use_the_drivers_folder_if_they_can_see_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.getcwd()
    with Driver(Driver.here().versions, str(tmp_path)).enter("tcp://x"):
        assert os.getcwd() == str(tmp_path)
    with Driver(Driver.here().versions, "/no/such/folder").enter("tcp://x"):
        assert os.getcwd() == before
    assert os.getcwd() == before
