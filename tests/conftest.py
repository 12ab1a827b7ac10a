"""What every test shares: one thread for torch (small tensors gain nothing from more, and lose much on a busy machine)."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import S3Server, serving

os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` starts processes that ignore it, and so would ours


@pytest.fixture(autouse=True)
def _no_home_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine settings of whoever runs the tests do not change what they prove."""
    for name in ("MLFLOW_TRACKING_URI", "OMMATID_CHECKOUT", "OMMATID_EXPERIMENT", "OMMATID_FLOW_RUN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server on this machine, with a bucket named `bucket`."""
    with serving(tmp_path_factory.mktemp("s3") / "root") as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """URL of an empty prefix on a real S3 server on this machine; the environment leads to it."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}"
