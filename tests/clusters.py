"""Real clusters on loopback, in processes of their own, as if they were somebody else's."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from processes import TESTS
from s3_server import free_port
from waiting import wait_for, wait_for_end

from ommatid.config.extract import RayExecutor


@contextmanager
def dask_scheduler(path: str = "") -> Iterator[str]:
    """A scheduler in a process of its own."""
    address = f"tcp://127.0.0.1:{free_port()}"
    with _process("dask_scheduler", "--host", address, "--no-dashboard", path=path):
        _wait_for(address)
        yield address


def _wait_for(address: str) -> None:
    host, port = address.removeprefix("tcp://").split(":")

    def answers() -> bool:
        with suppress(OSError):
            socket.create_connection((host, int(port))).close()
            return True
        return False

    wait_for(answers, "the scheduler to listen")


@contextmanager
def dask_workers(address: str, folder: Path, path: str = str(TESTS)) -> Iterator[None]:
    """Two worker processes with two threads each, which start again when they die, and work elsewhere."""
    names = ("--nworkers", "2", "--nthreads", "2", "--memory-limit", "0", "--no-dashboard", "--local-directory", str(folder))
    with _process("dask_worker", address, "--host", "127.0.0.1", *names, path=path, folder=folder):
        yield


@contextmanager
def _process(module: str, *arguments: str, path: str = "", folder: Path | None = None) -> Iterator[None]:
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-m", f"distributed.cli.{module}", *arguments]
    with subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


@contextmanager
def ray_cluster(log: Path, n_places: int = 2, path: str = str(TESTS)) -> Iterator[RayExecutor]:
    """A cluster that belongs to somebody else."""
    address = f"127.0.0.1:{free_port()}"
    options = {"num-cpus": n_places, "node-ip-address": "127.0.0.1", "port": address.partition(":")[2], "include-dashboard": "false"}
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = os.environ | {"PYTHONPATH": path}
    with log.open("w") as file, subprocess.Popen(command, env=environment, cwd=log.parent, stdout=file, stderr=file) as process:
        try:

            def started() -> bool:
                assert process.poll() is None, log.read_text()
                return "Ray runtime started" in log.read_text()

            wait_for(started, "Ray to start")
            yield RayExecutor(kind="ray", address=address, workers=1)
        finally:
            tree = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            wait_for_end(tree, "Ray's processes")
