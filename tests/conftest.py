"""What every test shares: one thread for torch (small tensors gain nothing from more, and lose much on a busy machine)."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _no_home_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine settings of whoever runs the tests do not change what they prove."""
    for name in ("MLFLOW_TRACKING_URI", "OMMATID_CHECKOUT", "OMMATID_EXPERIMENT", "OMMATID_FLOW_RUN"):
        monkeypatch.delenv(name, raising=False)
