"""Checkouts for the tests of the flows; see support.checkout."""

import os
import shutil
from pathlib import Path

import pytest

from support.checkout import make_checkout, run


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which every stage was run once, which tests copy."""
    root = make_checkout(tmp_path_factory.mktemp("made") / "checkout")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMMATID_CACHE", str(root.parent / "cache"))
        run(root, "dvc", "repro")
    return root


@pytest.fixture
def checkout(made: Path, tmp_path: Path) -> Path:
    """A test's own copy of the checkout, with every stage up to date."""
    root = tmp_path / "checkout"
    shutil.copytree(made, root, symlinks=True)
    (root / "ran.log").unlink()
    return root


@pytest.fixture(autouse=True)
def _no_identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Use a fresh machine, on which git has no name and email address."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for key in [key for key in os.environ if key.startswith("GIT_")]:
        monkeypatch.delenv(key)
