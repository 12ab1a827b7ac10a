"""Proves that what DVC depends on is what the stages read: it follows contents, not times or places, and covers all paths in the params."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ommatid.config import STAGE_NAMES, Params, load_params
from ommatid.errors import ArtefactError, SourceError
from ommatid.reviews import PLACE as PEOPLE
from ommatid.reviews import ReviewLog
from ommatid.sources import stage as sources
from ommatid.sources.stage import CODE, PLACE, write_sources
from ommatid.store.filesystem import disk, listing, open_folder
from ommatid.store.filesystem.disk import Disk
from support.study import CHECKOUT


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMMATID_CACHE", str(tmp_path / "cache"))


def params(*overrides: str) -> Params:
    return load_params(CHECKOUT / "params.yaml", overrides)


def write(path: str, content: bytes = b"x") -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)
    return Path(path)


@pytest.fixture
def photos() -> Callable[[], str]:
    """Makes the folder `photos`, and returns a function that returns what DVC compares of it at the call."""
    write("photos/dog/a.jpg", b"a")
    write("photos/b.jpg", b"b")
    chosen = params("images.source={kind: folder, path: photos}")

    def look() -> str:
        write_sources(chosen)
        return (PLACE / "images.json").read_text()

    return look


def test_every_stage_gets_a_file_that_describes_its_sources(photos: Callable[[], str]) -> None:
    found = json.loads(photos())["images.source.path"]
    assert (found["n_files"], found["bytes"], len(found["sha256"])) == (2, 2, 64)
    assert sorted(path.name for path in PLACE.iterdir()) == sorted(f"{stage}.json" for stage in STAGE_NAMES)
    assert all("schemas.py" in json.loads((PLACE / f"{stage}.json").read_text())[CODE] for stage in STAGE_NAMES)


def test_of_a_log_of_reviews_only_the_names_count(photos: Callable[[], str]) -> None:
    def look() -> dict[str, Any]:
        photos()
        found = json.loads((PLACE / "label.json").read_text())
        assert found.pop(CODE)
        return found

    log = ReviewLog(PEOPLE)
    log.append("Ada", "sae-0", 3, "rate", 5, direction=lambda: np.ones(4))
    assert look() == {}
    log.append("Ada", "sae-0", 3, "rename", "horse")
    (found,) = (named := look()).values()
    assert list(named) == ["label.labellers.1.path"] and list(found) == ["sha256"]
    log.append("Ada", "sae-0", 3, "comment", "a horse")
    assert look() == named
    log.append("Ada", "sae-0", 3, "rename", "pony")
    assert look() != named


def test_the_fingerprint_depends_on_names_and_contents_alone(photos: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = photos()
    os.utime("photos/b.jpg", (1, 1))
    assert photos() == first
    Path("photos").rename("moved")
    Path("photos").symlink_to("moved", target_is_directory=True)
    monkeypatch.setenv("OMMATID_CACHE", "/proc/nowhere")  # cannot be written
    assert photos() == first
    write("photos/.hidden/c.jpg")
    assert photos() == first
    seen = {first}
    for change in (
        lambda: write("photos/b.jpg", b"c"),
        lambda: Path("photos/b.jpg").rename("photos/c.jpg"),
        lambda: write("photos/captions.csv", b"path,caption\nc.jpg,x\n"),
        lambda: Path("photos/c.jpg").unlink(),
    ):
        change()
        now = photos()
        assert now not in seen
        seen.add(now)


def test_links_are_followed_and_pipes_are_skipped(photos: Callable[[], str]) -> None:
    """Linked folders, pipes, broken links, a loop, names that are not UTF-8, and a file that may not be read."""
    write("elsewhere/c.jpg", b"c")
    Path("photos/ext").symlink_to(Path("elsewhere").absolute(), target_is_directory=True)
    Path("photos/up").symlink_to(Path("photos").absolute(), target_is_directory=True)
    Path("photos/gone.jpg").symlink_to("nowhere")
    os.mkfifo("photos/pipe.jpg")
    write(os.fsdecode(b"photos/caf\xe9.jpg"), b"d")
    first = photos()
    assert json.loads(first)["images.source.path"]["n_files"] == 5
    write("elsewhere/new.jpg", b"e")
    assert (second := photos()) != first
    write("photos/nowhere", b"f").rename("nowhere")
    Path("photos/gone.jpg").unlink()
    Path("photos/gone.jpg").symlink_to(Path("nowhere").absolute())
    assert photos() not in (first, second)


def read_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of files whose content is read from now on."""
    read: list[str] = []
    original = Disk.open
    monkeypatch.setattr(Disk, "open", lambda folder, name, size=None: read.append(name) or original(folder, name, size))
    return read


def age(*paths: str) -> None:
    """Let no file be so young that it could change unnoticed; the time of the change of its entry cannot be set, so wait for that."""
    for path in paths:
        os.utime(path, (1, 1))
    time.sleep(listing.SETTLED_NS / 1e9 + 0.02)


def test_only_what_changed_is_read_again(photos: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "SETTLED_NS", 10**8)
    age("photos/dog/a.jpg", "photos/b.jpg")
    read = read_of(monkeypatch)
    first = photos()
    assert sorted(read) == ["b.jpg", "dog/a.jpg"]
    read.clear()
    assert photos() == first and read == []
    write("photos/b.jpg", b"B")
    os.utime("photos/b.jpg", (1, 1))  # as `cp --preserve` and rsync do: same size, same time of change
    changed = os.stat("photos/b.jpg").st_ctime_ns
    monkeypatch.setattr(listing.time, "time_ns", lambda: changed + 1)  # a busy machine looks later
    second = photos()
    assert second != first and read == ["b.jpg"]
    assert photos() == second and read == ["b.jpg"] * 2  # changed a moment ago: it may yet change within the same tick of the clock
    (memory,) = Path("cache/checksums").iterdir()
    memory.write_text("[1, 2")
    assert photos() == second


def test_every_path_in_the_params_is_checked() -> None:
    write("words/birds.txt", b"heron\n")
    write("labels.csv", b"latent,label\n")
    write("models/clip/config.json")
    write("models/judge/config.json")
    write("my_model.py")
    write("saes/x/cfg.json")
    write("photos/a.jpg")
    write("masks/a.png")
    write("heads/head.safetensors")
    write("rulers.csv", b"path,ruler\n")
    chosen = params(
        "images.source={kind: folder, path: photos}",
        "extract.model={kind: module, factory: 'my_model:make'}",
        "extract.judge=[{kind: transformers, path: models/judge}, {kind: transformers, path: facebook/dinov2-base}]",
        "extract.namer={kind: clip, path: models/clip}",
        "train.runs=[{variant: {kind: imported, path: saes/x}}]",
        "label.labellers=[{kind: vocabulary, words: [imagenet, words/birds.txt]}, {kind: human, path: labels.csv}, {kind: captioner}]",
        "intervene.masks=masks",
        "intervene.head=heads/head.safetensors",
        "intervene.audit={attributes: rulers.csv}",
    )
    found = write_sources(chosen)
    assert {stage: list(keys) for stage, keys in found.items()} == {
        "images": ["images.source.path"],
        "extract": ["extract.model.factory", "extract.judge.0.path", "extract.namer.path"],
        "train": ["train.runs.0.variant.path"],
        "label": ["label.labellers.0.words.1", "label.labellers.1.path"],
        "evaluate": [],
        "intervene": ["intervene.masks", "intervene.head", "intervene.audit.attributes"],
        "catalog": [],
    }
    for stage, path in [
        ("extract", "models/judge/config.json"),
        ("train", "saes/x/new"),
        ("label", "labels.csv"),
        ("intervene", "masks/a.png"),
        ("intervene", "heads/head.safetensors"),
        ("intervene", "rulers.csv"),
        ("extract", "my_model.py"),
    ]:
        write(path, b"changed")
        again = write_sources(chosen)
        assert [other for other in found if again[other] != found[other]] == [stage]
        found = again


def test_values_that_dvc_does_not_see_in_params_yaml_are_recorded() -> None:
    write("photos/a.jpg")

    def look(*overrides: str) -> dict[str, Any]:
        write_sources(params("images.source={kind: folder, path: photos}", *overrides))
        found = [json.loads((PLACE / f"{stage}.json").read_text()) for stage in STAGE_NAMES]
        return {key: value for one in found for key, value in one.items() if key not in (CODE, "images.source.path")}

    assert look() == {"images.by_reference": False, "intervene.audit": {"n": 16, "attributes": None}}
    assert look("intervene.audit={n: 16}", "images.by_reference=true", "images.executor={kind: local}") == {"images.by_reference": True}
    found = look("extract.model={kind: clip}", "train.runs=[{variant: jumprelu}, {variant: matryoshka, k: 3}]")
    shares = [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]
    assert (found["train.jumprelu-1280-k16-s0.variant.bandwidth"], found["train.matryoshka-1280-k3-s0.variant.prefixes"]) == (0.1, shares)
    assert found["extract.model.path"] == "openai/clip-vit-base-patch32"


def test_the_file_of_a_question_and_the_model_that_scores_its_answers_are_followed() -> None:
    write("photos/a.jpg")
    write("models/clip/config.json")
    write("questions/colour.txt", b"Which colour?")
    chosen = ["images.source={kind: folder, path: photos}", "extract.model={kind: llava, path: models/llava}"]
    chosen += ["intervene.answers={question: questions/colour.txt, joint: {kind: clip, path: models/clip}}"]
    found, identity = write_sources(params(*chosen)), params(*chosen).intervene.identity()
    assert list(found["intervene"]) == ["intervene.answers.question", "intervene.answers.joint.path"]
    assert identity["answers"]["question"] == "Which colour?"
    write("questions/colour.txt", b"Which color?")
    assert write_sources(params(*chosen))["intervene"] != found["intervene"]
    assert params(*chosen).intervene.identity()["answers"]["question"] == "Which color?"


def test_files_of_activations_replace_images() -> None:
    write("acts/readme.txt")
    np.save("acts/x.npy", np.zeros((4, 2), np.float16))
    chosen = params("extract={source: files, path: acts, name: blocks.15, model: theirs}", "images.source.path=gone")
    found = write_sources(chosen)
    assert found["images"] == {} and found["extract"]["extract.path"]["n_files"] == 1
    np.save("acts/x.image.npy", np.arange(4))
    assert write_sources(chosen)["extract"] != found["extract"]


@pytest.mark.parametrize("source", ["{kind: folder, path: gone}", "{kind: parquet, path: gone}", "{kind: cifar10, path: gone}"])
def test_a_source_that_was_not_pulled_is_reported_and_its_file_is_kept(source: str, photos: Callable[[], str]) -> None:
    before = photos()
    with pytest.raises(
        SourceError, match=r"^gone: no such (file or )?folder; bring it back with `dvc pull` if DVC keeps it, or set images"
    ):
        write_sources(params(f"images.source={source}"))
    assert (PLACE / "images.json").read_text() == before


def test_drawn_and_downloaded_images_are_described_by_their_json_files() -> None:
    write("plan.json", b"{}")
    drawn, loaded = (write_sources(params(f"images.source={{kind: {kind}, path: plan.json}}")) for kind in ("shapes", "cifar10"))
    assert drawn == loaded
    write("plan.json", b"[]")
    assert write_sources(params("images.source={kind: shapes, path: plan.json}")) != drawn


def test_the_parquet_source_skips_hidden_files_and_other_extensions() -> None:
    Path("in/.ipynb_checkpoints").mkdir(parents=True)
    for name in ("in/a.parquet", "in/.ipynb_checkpoints/a-checkpoint.parquet"):
        pq.write_table(pa.table({"image": [b"x"]}), name)
    chosen = params("images.source={kind: parquet, path: in}")
    first = write_sources(chosen)
    assert first["images"]["images.source.path"]["n_files"] == 1
    write("in/notes.txt")
    assert write_sources(chosen) == first


def test_an_object_store_is_listed_but_not_read(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(name: str, content: bytes) -> None:
        open_folder(f"{s3}/photos").put(write("to-put", content), name)

    put("a.jpg", b"a")
    put("dog/b.jpg", b"b")
    chosen = params(f"images.source={{kind: folder, path: '{s3}/photos'}}")
    found: dict[str, Any] = write_sources(chosen)
    assert found["images"]["images.source.path"]["n_files"] == 2
    put(".hidden.jpg", b"c")
    assert write_sources(chosen) == found
    put("a.jpg", b"A")
    assert write_sources(chosen) != found
    with pytest.raises(ArtefactError, match="there is no such bucket"):
        write_sources(params("images.source={kind: folder, path: s3://no-such-bucket/photos}"))


def test_a_change_while_other_files_are_read_is_noticed_though_it_leaves_the_same_times(
    photos: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, checksum = [10**18], sources._checksum
    monkeypatch.setattr(listing, "time", SimpleNamespace(time_ns=lambda: now[0]))
    monkeypatch.setattr(disk, "_stamp_of", lambda status: f"{10**18} {10**18}")  # a clock that ticks once in a long time

    def read_slowly(file: listing.Listed) -> str:
        found = checksum(file)
        if file.name == "b.jpg":
            write("photos/b.jpg", b"c")
            now[0] += 2 * listing.SETTLED_NS
        return found

    with monkeypatch.context() as patch:
        patch.setattr(sources, "_checksum", read_slowly)
        before = photos()
    assert photos() != before


def test_a_time_in_the_future_is_no_reason_to_read_a_file_again(photos: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "SETTLED_NS", -(10**9))  # the files of this test are young
    os.utime("photos/b.jpg", (2**32, 2**32))  # a camera with a wrong date
    before, read = photos(), []
    monkeypatch.setattr(sources, "_checksum", lambda file: read.append(file.name))
    assert photos() == before and not read


def test_a_folder_behind_a_link_may_have_a_name_that_is_not_utf_8(photos: Callable[[], str]) -> None:
    before = photos()
    os.rename(b"photos", b"caf\xe9")
    os.symlink(b"caf\xe9", b"photos")
    assert photos() == before


def test_caches_in_use_do_not_look_unused(photos: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "SETTLED_NS", -(10**9))
    photos()
    caches = sorted(path for path in (tmp_path / "cache").rglob("*.json"))
    assert {path.parent.name for path in caches} == {"checksums", "code"}
    for path in caches:
        os.utime(path, (1, 1))
    photos()
    assert all(path.stat().st_mtime > 1 for path in caches)
