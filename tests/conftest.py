"""Settings of every test: torch uses one thread, because small tensors gain nothing from more and lose much on a busy machine."""

import gc
import os
import signal
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import support.shapes  # noqa: F401  (jaxtyping's hook, which pytest installs, finds it only once it is imported)
from support.servers import S3Server, serving

if TYPE_CHECKING:
    from ommatid.catalog.reader import Catalog

os.environ.setdefault("OMP_NUM_THREADS", "1")
_caches = tempfile.TemporaryDirectory(prefix="ommatid-cache-")
os.environ["OMMATID_CACHE"] = _caches.name  # the caches of the person who runs the tests are neither read nor written
os.environ["OMMATID_CACHE_GB"] = "0"  # activations are cached only by the tests that are about it
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` starts processes that ignore it, and so would ours


LONGEST = ("flows/test_serve.py", "estimate/test_estimate.py", "pipeline/test_line_s3.py", "sae/test_trainer.py")
"""Files that take minutes. They come first, so that no process is left with one of them when the others have finished."""


def pytest_xdist_auto_num_workers() -> int:
    """Let `pytest --numprocesses auto` start one process more than there are cores, as many tests wait for servers."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; `make test` lets pytest-xdist hand out the files in this order."""
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect the tests without Python's collector of garbage, which would find none in what it would walk through again and again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        _pass_over()


_n_modules = 0


def _pass_over() -> None:
    """Let Python's collector of garbage pass over the million objects that modules and tests are made of, as they stay until the end.

    Walking through them took a quarter of the time of all tests.
    """
    global _n_modules
    _n_modules = len(sys.modules)
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Pass over the modules, too, that a test has imported, once what it has left behind is collected."""
    if len(sys.modules) > _n_modules + 50:
        gc.collect()
        _pass_over()


@pytest.fixture(autouse=True)
def _no_home_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Isolate the tests from the machine settings of the person who runs them."""
    for name in ("MLFLOW_TRACKING_URI", "OMMATID_CHECKOUT", "OMMATID_EXPERIMENT", "OMMATID_FLOW_RUN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server on this machine, with a bucket named `bucket`."""
    with serving(tmp_path_factory.mktemp("s3") / "root") as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """URL of an empty prefix on a real S3 server on this machine, for which the environment is set."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}"


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of one tiny catalogue, shared by all tests that only read it."""
    from support import catalog as artefacts

    root = tmp_path_factory.mktemp("catalogue")
    artefacts.build(root, artefacts.make_inputs(root))
    return artefacts.path_in(root)


@pytest.fixture(scope="session")
def catalog(file: Path) -> Iterator["Catalog"]:
    """The same catalogue, open."""
    from ommatid.catalog.reader import Catalog

    with Catalog(file) as opened:
        yield opened
