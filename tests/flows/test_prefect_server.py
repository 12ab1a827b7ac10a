"""Proves that a flow run by hand ends with one line, whatever happens to its Prefect server, its params or its stages."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.server.database.configurations import AioSqliteConfiguration
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from flows.prefect_server import lock_to_resume
from flows.processes import START_SECONDS, free_port
from support.checkout import REPOSITORY
from support.processes import wait_for


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a user's shell, with no settings of Prefect other than those of the test."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")}
    return {**mine, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "src")]), **more}


def run_flow(checkout: Path, name: str, **more: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", f"flows.{name}"], cwd=checkout, env=environment(**more), capture_output=True, text=True)


@pytest.mark.parametrize("name", ["pipeline", "retrain"])
def test_a_dead_server_is_reported_in_one_line_that_says_what_to_do(checkout: Path, name: str) -> None:
    dead = f"http://somebody:secret@127.0.0.1:{free_port(20_000)}/api"
    done = run_flow(checkout, name, PREFECT_API_URL=dead)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: the Prefect server at http://127.0.0.1:") and done.stderr.count("\n") == 1
    assert "Connection refused; start it, or correct the address, or unset PREFECT_API_URL" in done.stderr
    assert "secret" not in done.stderr


def test_a_temporary_server_that_dies_is_noticed_at_once(checkout: Path, tmp_path: Path) -> None:
    nowhere = f"sqlite+aiosqlite:///{tmp_path}/not/there/prefect.db"
    start = time.monotonic()
    done = run_flow(checkout, "pipeline", PREFECT_SERVER_DATABASE_CONNECTION_URL=nowhere)
    assert time.monotonic() - start < START_SECONDS
    assert done.returncode == 1 and done.stderr.startswith("error: temporary-server ended with status ")
    assert done.stderr.count("\n") == 1 and str(checkout / ".prefect/logs/temporary-server.log") in done.stderr


@pytest.mark.parametrize("name", ["pipeline", "serve"])
def test_broken_params_are_reported_in_one_line(checkout: Path, name: str) -> None:
    params = checkout / "params.yaml"
    params.write_text(params.read_text().replace("k: 32", "k: many"))
    done = run_flow(checkout, name)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "params.yaml: train.k: got 'many'; input should be a valid integer" in done.stderr


def test_a_failing_stage_ends_in_its_error_and_leaves_no_server(checkout: Path) -> None:
    params = checkout / "params.yaml"
    params.write_text(params.read_text().replace("k: 32", "k: 13"))
    done = run_flow(checkout, "pipeline", OMMATID_TEST_MARK=str(checkout), PREFECT_API_URL="")  # an empty one names no server
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: train: 13 is unlucky"
    assert "temporary server" not in done.stderr, "Prefect started a server of its own"
    assert "Traceback" not in done.stderr + done.stdout
    wait_for(lambda: not marked(checkout), "what the run started to end")


def test_sigterm_ends_the_stage_and_the_temporary_server(checkout: Path) -> None:
    (checkout / "fake.py").write_text("import time\nprint('working', flush=True)\ntime.sleep(600)\n")
    (checkout / "src/train.py").write_text("changed = True\n")
    command = [sys.executable, "-m", "flows.pipeline"]
    env = environment(OMMATID_TEST_MARK=str(checkout))
    with subprocess.Popen(command, cwd=checkout, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as flow:
        assert flow.stdout
        said = []
        for line in flow.stdout:
            said.append(line)
            if "working" in line:
                flow.send_signal(signal.SIGTERM)
        assert flow.wait() == 143 and said[-1] == "stopped: asked to end by SIGTERM\n", said
    wait_for(lambda: not marked(checkout), "what the run started to end")


def marked(checkout: Path) -> list[psutil.Process]:
    """Return the processes that a run of a test has left."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("OMMATID_TEST_MARK") == str(checkout):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_sigkill_leaves_no_temporary_server(checkout: Path) -> None:
    (checkout / "fake.py").write_text("import time\nprint('working', flush=True)\ntime.sleep(2)\n")
    (checkout / "src/train.py").write_text("changed = True\n")
    env = environment(OMMATID_TEST_MARK=str(checkout))
    command = [sys.executable, "-m", "flows.pipeline"]
    with subprocess.Popen(command, cwd=checkout, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as flow:
        assert flow.stdout and any("working" in line for line in flow.stdout)
        assert any("flows.parent_watch" in process.cmdline() for process in marked(checkout))
        flow.kill()
    wait_for(lambda: not marked(checkout), "what the run started to end")


def test_a_request_to_resume_a_run_takes_the_lock_before_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another writer comes between the read and the write of a transaction, as it may in Prefect's; otherwise SQLite refuses the write."""
    monkeypatch.setattr(AioSqliteConfiguration, "begin_transaction", AioSqliteConfiguration.begin_transaction)  # put back at the end
    database = tmp_path / "prefect.db"
    config = AioSqliteConfiguration(f"sqlite+aiosqlite:///{database}", timeout=60)

    def write() -> None:
        with sqlite3.connect(database, timeout=60) as other:
            other.execute("INSERT INTO runs VALUES (1)")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = await config.session(await config.engine())
        async with session, config.begin_transaction(session):
            await session.execute(text("SELECT count(*) FROM runs"))
            writer = asyncio.create_task(asyncio.to_thread(write))
            await asyncio.wait([writer], timeout=1)  # it waits for the lock, unless nobody holds it
            await session.execute(text("INSERT INTO runs VALUES (2)"))
        await writer

    async def ask(path: str) -> None:
        session = await config.session(await config.engine())
        async with session, config.begin_transaction(session, with_for_update=True):
            await session.execute(text("CREATE TABLE IF NOT EXISTS runs (n INTEGER)"))
        await lock_to_resume(app)({"type": "http", "path": path}, None, None)  # type: ignore[arg-type]

    asyncio.run(ask("/api/flow_runs/1/resume"))
    with sqlite3.connect(database) as reader:
        assert sorted(reader.execute("SELECT n FROM runs")) == [(1,), (2,)]
    with pytest.raises(OperationalError, match="database is locked"):
        asyncio.run(ask("/api/flow_runs/filter"))
