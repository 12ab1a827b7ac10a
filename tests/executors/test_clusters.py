"""No process outlives the driver of a Dask or Ray cluster, and a missing library is an error that says how to install it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import Driver

DRIVER = """
import sys
from support.jobs import WriteJob
from ommatid.config.extract import {section}
from ommatid.executors import run

if __name__ == "__main__":
    params = {section}(kind="{kind}", address=None, workers=2)
    run(params, WriteJob(sys.argv[1], seconds=0.2), range(10_000), lambda shard: print(shard, flush=True))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize(("kind", "section"), [("dask", "DaskExecutor"), ("ray", "RayExecutor")])
def test_no_process_outlives_its_driver(tmp_path: Path, kind: str, section: str, number: signal.Signals, driver: Driver) -> None:
    driver.start(DRIVER.format(kind=kind, section=section), tmp_path)
    driver.end(number)


@pytest.mark.parametrize(("kind", "library"), [("dask", "distributed"), ("ray", "ray")])
def test_a_missing_library_is_an_error_with_the_command_that_installs_it(kind: str, library: str) -> None:
    code = f"import sys; sys.modules['{library}'] = None; import ommatid.executors.{kind}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"ExecutorError: extract.executor: {kind} is not installed" in ended.stderr
    assert f"pip install 'ommatid[{kind}]'" in ended.stderr
