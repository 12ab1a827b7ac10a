"""Proves the whole pipeline on real models: every stage succeeds after a full disk and a SIGKILL, and its results can be queried.

Drawn pictures go through the built-in EfficientNet-Lite, MiniLM and the real gates by the command line, as `dvc repro` does it.
The tests of this file run in order: each needs the artefacts of the one before.
"""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ommatid import store
from ommatid.catalog.reader import Catalog
from ommatid.config import STAGE_NAMES as NAMES
from ommatid.pipeline import STAGES
from ommatid.store.filesystem import disk
from support.study import make_test_params, run_verb
from support.tiles import write_tile_folder

N_IMAGES = 90
D_SAE = 24


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with params.yaml and pictures."""
    root = tmp_path_factory.mktemp("checkout")
    write_tile_folder(root / "photos", N_IMAGES)
    (root / "photos" / "notes.txt").write_text("not a picture")
    (root / "words.txt").write_text("red\ngreen\nblue\ngrey\ncar\nhorse\n")
    params = make_test_params(
        images={"source": {"kind": "folder", "path": "photos"}, "limit": None},
        extract={"model": {"kind": "lite", "image_size": 64}, "judge": {"kind": "lite", "variant": "lite2", "image_size": 64}},
        train={"d_sae": D_SAE, "k": 2, "epochs": 30, "batch_size": 64, "max_dead": 0.9},
        label={"labellers": [{"kind": "vocabulary", "words": ["words.txt"]}], "min_examples": 2},
    )
    (root / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    return root


@pytest.fixture(autouse=True)
def _inside(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)


def kill_in_the_middle(stage: str) -> None:
    """Kill a stage by SIGKILL at its first line of progress, or at the first file of its draft."""
    command = [sys.executable, "-m", "ommatid.cli", stage]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("stage", NAMES)
def test_each_stage_succeeds_after_a_full_disk_and_a_kill(
    stage: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = STAGES[stage].place

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(disk, "sync", full)
        assert run_verb(stage) == 1
    assert "the disk is full" in capsys.readouterr().err
    assert not place.exists()

    kill_in_the_middle(stage)
    assert not place.exists()

    assert run_verb(stage) == 0
    assert f"{stage}: {place} holds" in capsys.readouterr().out
    store.open_artefact(place, STAGES[stage].kind).verify()
    report = json.loads(Path(f"data/quality/{stage}.json").read_text())
    assert report["n_failed"] == 0 < report["n_checks"]
    assert [p.name for p in Path("data/.work").iterdir() if p.is_dir()] == []


def test_rejected_pictures_are_listed() -> None:
    rejected = store.open_artefact(Path("data/images"), "images").read("rejected").to_pylist()
    assert [(row["path"], row["reason"]) for row in rejected] == [("notes.txt", "not_an_image")]


def test_the_catalogue_has_a_feature_for_every_latent_and_its_lineage() -> None:
    with Catalog(Path("data/catalog/catalog.duckdb")) as catalog:
        assert catalog.rows("SELECT count(*), count(DISTINCT latent) FROM features") == [(D_SAE, D_SAE)]
        assert catalog.rows("SELECT count(*) FROM images WHERE split = 'eval'")[0][0] > 5
        ((run_id, params),) = catalog.rows("SELECT mlflow_run_id, params FROM runs")
        assert run_id is not None
        assert json.loads(params)["train"]["k"] == 2
        ms, floor, neurons = catalog.rows("SELECT ms, ms_floor, (SELECT ms FROM comparisons WHERE dictionary = 'neurons') FROM runs")[0]
        assert -1 <= floor <= 1
        assert ms is not None
        assert neurons is not None
        shown = dict(catalog.rows("SELECT spliced, cross_entropy FROM zero_shot"))
        assert shown.keys() == {"plain", "sae", "sae_with_error", "mean", "untrained", "sparse_neurons"}
        assert shown["sae_with_error"] == pytest.approx(shown["plain"], abs=1e-3) != shown["sae"]


def test_query_and_show_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("query", "SELECT latent, label, ms, density FROM features ORDER BY ms DESC LIMIT 3", "--format", "json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 3
    assert set(rows[0]) == {"latent", "label", "ms", "density"}
    assert run_verb("show", str(rows[0]["latent"])) == 0
    path = Path(capsys.readouterr().out.strip())
    with Image.open(path) as picture:
        assert min(picture.size) > 300
    assert run_verb("show") == 0
    assert Path("data/pictures/best.png").exists()


def test_all_damage_to_an_artefact_is_named_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    place = Path("data/activations/blocks.15")
    first, second = place / "train-00000.parquet", place / "eval-00000.parquet"
    kept = first.read_bytes(), second.read_bytes()
    first.unlink()
    second.write_bytes(kept[1][:1000])
    try:
        assert run_verb("train") == 1
        error = capsys.readouterr().err
        assert "data/activations/blocks.15: damaged (2)" in error
        assert "train-00000.parquet: missing" in error
        assert "eval-00000.parquet: 1000 bytes, the manifest says" in error
    finally:
        first.write_bytes(kept[0])
        second.write_bytes(kept[1])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["images", "--set", "images.source.path=nowhere"], "nowhere"),
        (["images", "--set", "images.source.path=empty"], "empty"),
        (["images", "--set", "images.source.path=texts"], "quality gate failed"),
        (["images", "--set", "images.source.path=one"], "quality gate failed"),
        (["images", "--set", "images.source.path=twins"], "quality gate failed"),
        (["images", "--set", "images.max_rejectd=1"], "unknown key; did you mean max_rejected?"),
        (["train", "--set", "train.k=100"], "k is 100, larger than d_sae 24"),
        (["extract", "--set", "extract.hookpoints=[blocks.99]"], "blocks.9"),
        (["extract", "--set", "extract.tokens=cls"], "it has patch, pooled, all"),
        (["extract", "--set", "extract.model={kind: clip, path: someone/some-clip}"], "kind: lite"),
        (["extract", "--set", "extract.judge={kind: transformers, path: someone/some-vit}"], "network"),
        (["label", "--set", "label.labellers=[{kind: vocabulary, words: [nowhere.txt]}]"], "nowhere.txt"),
        (["train", "--params", "none.yaml"], "none.yaml: no such file"),
        (["query", "SELECT labl FROM features"], "labl"),
        (["show", "99999"], "99999"),
    ],
)
def test_bad_input_is_named_and_nothing_is_lost(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make_bad_sources()
    before = {name: store.open_artefact(stage.place, stage.kind).digest for name, stage in STAGES.items()}
    assert run_verb(*arguments) == 1
    _, _, error = f"\n{capsys.readouterr().err}".partition("\nerror: ")
    assert says in error
    assert "Traceback" not in error
    assert before == {name: store.open_artefact(stage.place, stage.kind).digest for name, stage in STAGES.items()}


def make_bad_sources() -> None:
    for name in ("empty", "texts", "one", "twins"):
        Path(name).mkdir(exist_ok=True)
    for i in range(3):
        Path(f"texts/{i}.txt").write_text(f"text {i}")
    picture = next(Path("photos/red").iterdir()).read_bytes()
    for path in ("one/a.png", "twins/a.png", "twins/b.png"):
        Path(path).write_bytes(picture)
