"""Proves that services end with everything they started, and with what a killed service left behind."""

import os
import sys
from pathlib import Path

import psutil
import pytest

from flows.processes import Services
from support.processes import wait_for, wait_for_end


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
    finally:
        services.end()
    wait_for_end([orphan], "what was left")
