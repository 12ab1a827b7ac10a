"""Proves the whole pipeline with artefacts on a real S3 server: the bytes are those on a disk, even after a SIGKILL in every stage.

The tests of this file run in order: each needs the artefacts of the one before.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from ommatid.catalog.reader import Catalog
from ommatid.pipeline import STAGES, open_stage
from ommatid.store import Artefact
from ommatid.store.filesystem import open_folder
from support.servers import S3Server
from support.study import make_test_params, run_verb
from support.tiles import write_tile_folder

DATA = "s3://bucket/line"


@pytest.fixture(scope="module", autouse=True)
def _checkout(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[None]:
    """A folder with params.yaml, an environment set for the server, and pictures on the server."""
    root = tmp_path_factory.mktemp("checkout")
    write_tile_folder(root / "photos", 60)
    (root / "words.txt").write_text("red\ngreen\nblue\ngrey\ncar\nhorse\n")
    params = make_test_params(
        images={"source": {"kind": "folder", "path": "s3://bucket/photos"}, "limit": None},
        extract={
            "model": {"kind": "lite", "image_size": 64},
            "judge": {"kind": "lite", "variant": "lite2", "image_size": 64},
            "hookpoints": ["blocks.11", "blocks.15"],
        },
        train={"hookpoint": "blocks.15", "d_sae": 24, "k": 2, "epochs": 30, "batch_size": 64, "max_dead": 0.9, "runs": [{}, {"d_sae": 12}]},
        label={"labellers": [{"kind": "vocabulary", "words": ["words.txt"]}], "min_examples": 2},
    )
    (root / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        patch.chdir(root)
        for path in Path("photos").rglob("*.png"):
            open_folder("s3://bucket/photos").put(path, path.relative_to("photos").as_posix())
        yield


def kill_in_the_middle(stage: str) -> None:
    """Kill a stage by SIGKILL at its first line of progress."""
    command = [sys.executable, "-m", "ommatid.cli", stage, "--data", DATA]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def artefacts(data: str) -> Iterator[tuple[str, Artefact]]:
    """Return all artefacts except the catalogue, which contains the time at which it was made."""
    for name in STAGES:
        if name != "catalog":
            yield name, open_stage(name, data=data)


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_succeeds_after_a_kill(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    if stage in ("extract", "train"):
        kill_in_the_middle(stage)
        assert not open_folder(DATA).folders().count(STAGES[stage].place.name)
    assert run_verb(stage, "--data", DATA) == 0
    assert f"{stage}: {DATA}/{STAGES[stage].place.name} holds" in capsys.readouterr().out
    open_stage(stage, data=DATA).verify()
    assert not STAGES[stage].place.exists()


@pytest.mark.parametrize("kind", ["dask", "ray"])
def test_workers_of_a_cluster_write_the_same_bytes(kind: str) -> None:
    before = open_stage("extract", data=DATA).digest
    open_folder(DATA).remove("activations")
    assert run_verb("extract", "--data", DATA, "--set", f"extract.executor={{kind: {kind}, address: null, workers: 2}}") == 0
    assert open_stage("extract", data=DATA).digest == before


def test_nothing_is_left_beside_the_artefacts() -> None:
    assert open_folder(DATA).folders() == sorted(["quality", *(stage.place.name for stage in STAGES.values())])
    left = [path for path in Path("data/.work").rglob("*") if path.is_file()]
    assert {path.suffix for path in left} == {".lock", ".published"}


def test_artefacts_have_the_same_bytes_as_on_a_disk() -> None:
    for stage in STAGES:
        assert run_verb(stage) == 0
    there, here = dict(artefacts(DATA)), dict(artefacts("data"))
    assert {name: one.digest for name, one in there.items()} == {name: one.digest for name, one in here.items()}


def test_the_catalogue_can_be_queried() -> None:
    with Catalog(open_stage("catalog", data=DATA).file("catalog.duckdb")) as catalog:
        assert catalog.ask("SELECT count(*) AS n FROM latents").dicts() == [{"n": 36}]


def test_a_stage_without_its_input_says_how_to_make_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("train", "--data", "s3://bucket/other") == 1
    assert (
        "s3://bucket/other/activations: does not exist; make it with `ommatid extract --data s3://bucket/other`" in capsys.readouterr().err
    )
