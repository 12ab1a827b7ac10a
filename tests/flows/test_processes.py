"""Proves that services end with everything they started and with what a killed service left behind, and what is said and kept of it."""

import os
import subprocess
import sys
import threading
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import psutil
import pytest

from flows.processes import LAST_PORT, Services, free_port, hold_port
from flows.serve import serve
from ommatid.errors import ConfigError, RunError
from support.checkout import REPOSITORY
from support.processes import HANG_SECONDS, wait_for, wait_for_end


def test_processes_left_by_a_killed_service_end_with_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parent.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "open('pids.tmp', 'w').write(str(child.pid))\n"
        "import os; os.rename('pids.tmp', 'pids')\n"
        "time.sleep(600)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    services = Services(env, tmp_path / "logs")
    monkeypatch.chdir(tmp_path)
    services.start("parent", "parent")
    try:
        wait_for((tmp_path / "pids").exists, "the service to start its child")
        orphan = psutil.Process(int((tmp_path / "pids").read_text()))
        parent = psutil.Process(orphan.ppid())
        parent.kill()
        wait_for(lambda: orphan.ppid() != parent.pid, "the child to lose its parent")
        assert "parent was killed by SIGKILL: " in wait_for(lambda: fault_of(services), "the end of the service")
    finally:
        services.end()
    wait_for_end([orphan], "what was left")


def fault_of(services: Services) -> str:
    try:
        services.check()
    except RunError as error:
        return str(error)
    return ""


def test_a_server_of_another_checkout_that_got_the_port_first_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its deployments would be replaced by ours, and its worker would work in this checkout."""
    monkeypatch.chdir(tmp_path)
    services = Services({**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, tmp_path / "logs")
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        try:
            services.start("prefect", "http.server", "--bind", "127.0.0.1", str(other.server_port))
            with pytest.raises(RunError, match=r"prefect ended with status 1: .*Address already in use"):
                services.wait_for("prefect", f"http://127.0.0.1:{other.server_port}/")
        finally:
            services.end()
            other.shutdown()
            thread.join(HANG_SECONDS)
        free = free_port(other.server_port + 1)
    services.start("prefect", "http.server", "--bind", "127.0.0.1", str(free))
    try:
        services.wait_for("prefect", f"http://127.0.0.1:{free}/")
    finally:
        services.end()


def test_ports_end_at_the_last_one() -> None:
    assert free_port(LAST_PORT, taken=[]) == LAST_PORT
    with pytest.raises(RunError, match=f"no free port from {LAST_PORT} to {LAST_PORT}"):
        free_port(LAST_PORT, taken=[LAST_PORT])


def test_a_port_is_kept_until_its_server_is_started() -> None:
    """The webhook is started a minute after its port was chosen, when another checkout may be looking for one."""
    port, holder = hold_port(free_port(20_000))
    with holder:
        assert free_port(port) == port, "a server can listen there"
        other, holder_of_other = hold_port(port)
        with holder_of_other:
            assert other > port
    again, holder = hold_port(port)
    holder.close()
    assert again == port


def test_a_webhook_that_cannot_listen_names_its_variables(tmp_path: Path) -> None:
    path = os.pathsep.join([str(REPOSITORY), *sys.path])
    given = {"PREFECT_API_URL": "http://127.0.0.1:1/api", "OMMATID_WEBHOOK_TOKEN": "secret", "OMMATID_WEBHOOK_HOST": "192.0.2.1"}
    command = [sys.executable, "-m", "flows.watch"]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | given | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: the webhook cannot listen at 192.0.2.1:8322 (Cannot assign requested address); set OMMATID_WEB")


@pytest.mark.parametrize("value", ["abc", "0", "70000", "-1", "4200.5"])
def test_a_variable_that_is_no_port_is_named(value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_PORT", value)
    with pytest.raises(ConfigError, match=f"MLFLOW_PORT: got '{value}'; set it to a port from 1 to 65535, or unset it to use 5000"):
        serve(REPOSITORY)


def test_the_log_of_the_start_before_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "speaker.py").write_text("import sys; print(sys.argv[1])")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    for word in ("first", "second", "third"):
        services = Services(env, tmp_path / "logs")
        services.start("speaker", "speaker", word)
        services.finish("speaker")
    assert {path.name: path.read_text().split() for path in (tmp_path / "logs").iterdir()} == {
        "speaker.log": ["third"],
        "speaker.log.1": ["second"],
    }
