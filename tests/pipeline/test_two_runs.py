"""Proves that the second of two concurrent runs of a stage waits and uses what the first made, whichever executor computes it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from ommatid.config import make_params
from ommatid.store import open_artefact
from support.study import make_test_params
from support.tiles import write_tile_folder


def start(checkout: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "ommatid.cli", "images"]
    return subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, text=True, env=environment)


def test_the_second_run_uses_what_the_first_made(tmp_path: Path) -> None:
    write_tile_folder(tmp_path / "photos", 30)
    params = make_test_params(images={"source": {"kind": "folder", "path": "photos"}, "limit": None})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    with start(tmp_path) as first:
        assert first.stdout
        assert first.stdout.readline() == "images: 30 of 30\n"
        first.send_signal(signal.SIGSTOP)
        with start(tmp_path) as second:
            assert second.stdout
            assert second.stdout.readline() == "waiting for another process that is making data/images: 0 of 1\n"
            first.send_signal(signal.SIGCONT)
            assert "images: data/images holds 30 images" in first.communicate()[0]
            said = second.communicate()[0]
    assert (first.returncode, second.returncode) == (0, 0)
    assert "images: data/images holds 30 images" in said
    assert "30 of 30" not in said
    open_artefact(tmp_path / "data/images", "images").verify()


def test_the_executor_does_not_change_the_identity_of_an_artefact() -> None:
    params = make_test_params()
    values = params.model_dump(mode="json")
    values["extract"]["executor"] = {"kind": "dask", "address": None, "workers": 3}
    other = make_params(values, "test")
    assert other.extract != params.extract
    assert other.extract.identity() == params.extract.identity()
    assert "executor" not in params.extract.identity()
    assert params.train.identity() == params.train.model_dump(mode="json", exclude={"init"}), "null, as older versions had it"
