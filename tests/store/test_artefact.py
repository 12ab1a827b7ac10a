"""Proves that an artefact is whole or absent, whatever happens to drafts, files, locks and writers."""

import errno
import json
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pytest

from ommatid import store
from ommatid.errors import ArtefactError
from ommatid.schemas import SCHEMA_VERSION
from ommatid.store import open_artefact, open_draft, part_name
from ommatid.store.damage import Checked

PARTS = 3


def write(place: Path, n: int = 10, params: dict[str, object] | None = None) -> store.Artefact:
    with open_draft(place, "images", params or {"a": 1}, {}) as draft:
        for i in range(PARTS):
            draft.write_table(part_name("images", i), pa.table({"x": list(range(n))}))
        draft.write_json("cfg.json", {"b": 2})
        draft.seal({"n": PARTS * n})
        return draft.publish(place)


def test_an_artefact_reads_back_as_it_was_written(tmp_path: Path) -> None:
    artefact = write(tmp_path / "images")
    assert artefact.rows("images") == len(artefact.read("images")) == 30
    assert artefact.tables == ["images"]
    assert artefact.summary == {"n": 30}
    assert [len(part) for part in artefact.iter_parts("images")] == [10, 10, 10]
    artefact.verify()
    assert not (tmp_path / ".work" / "scratch").exists()


def test_parts_are_read_and_decoded_by_the_calling_thread_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pa.table({name: pa.array(range(5000)) for name in "abcdef"})
    with open_draft(tmp_path / "made", "images", {}, {}) as draft:
        draft.write_table("rows.parquet", rows, row_group_size=1000)
        draft.seal({})
        artefact = draft.publish(tmp_path / "made")
    threads, readinto, read = set[int](), Checked.readinto, Checked.read
    monkeypatch.setattr(Checked, "read", lambda self, *args: threads.add(threading.get_ident()) or read(self, *args))
    monkeypatch.setattr(Checked, "readinto", lambda self, *args: threads.add(threading.get_ident()) or readinto(self, *args))
    assert artefact.read("rows").equals(rows)
    assert pa.Table.from_batches(artefact.iter_batches("rows")).equals(rows)
    with artefact.open_part("rows.parquet") as part:
        assert part.read_row_group(1).equals(rows.slice(1000, 1000))
    assert threads == {threading.get_ident()}


def test_parts_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    numbers = (9, 10001, 99999, 100000)
    with open_draft(tmp_path / "images", "images", {}, {}) as draft:
        for number in reversed(numbers):
            draft.write_table(part_name("images", number), pa.table({"x": [number]}))
        draft.seal({})
        assert draft.publish(tmp_path / "images").read("images")["x"].to_pylist() == list(numbers)


def test_same_content_has_the_same_digest(tmp_path: Path) -> None:
    assert write(tmp_path / "a").digest == write(tmp_path / "b").digest != write(tmp_path / "c", n=11).digest


def test_all_damage_is_named_at_once(tmp_path: Path) -> None:
    place = tmp_path / "images"
    write(place)
    (place / "images-00000.parquet").unlink()
    (place / "images-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(ArtefactError) as error:
        open_artefact(place, "images")
    assert "images-00000.parquet: missing" in str(error.value)
    assert "images-00002.parquet: 4 bytes, the manifest says" in str(error.value)
    assert "dvc checkout" in str(error.value)


def test_changed_bytes_of_the_same_size_are_found(tmp_path: Path) -> None:
    artefact = write(tmp_path / "images")
    path = artefact.path / "images-00001.parquet"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"images-00001.parquet: checksum differs"):
        open_artefact(artefact.path, "images").verify()


def test_missing_unfinished_other_and_newer_artefacts_are_refused(tmp_path: Path) -> None:
    place = tmp_path / "images"
    with pytest.raises(ArtefactError, match=r"does not exist; make it with `dvc repro images`"):
        open_artefact(place, "images")
    place.mkdir()
    with pytest.raises(ArtefactError, match=r"no manifest\.json, so it is incomplete"):
        open_artefact(place, "images")
    write(place)
    with pytest.raises(ArtefactError, match="holds images, expected sae"):
        open_artefact(place, "sae")
    manifest = json.loads((place / "manifest.json").read_text())
    for other in (99, 1):
        (place / "manifest.json").write_text(json.dumps(manifest | {"schema_version": other}))
        with pytest.raises(
            ArtefactError, match=f"images: written with schema version {other}, but this code reads {SCHEMA_VERSION}; run the stage again"
        ):
            open_artefact(place, "images")
    (place / "manifest.json").write_text("{")
    with pytest.raises(ArtefactError, match=r"images/manifest.json: damaged, or not a manifest"):
        open_artefact(place, "images")


def test_publishing_replaces_the_old(tmp_path: Path) -> None:
    write(tmp_path / "images", n=10)
    assert write(tmp_path / "images", n=20, params={"a": 2}).rows("images") == 60
    assert sorted(p.name for p in (tmp_path / ".work").iterdir()) == ["images.lock", "images.published"]


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(table: pa.Table, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ommatid.store.writer.pq.write_table", full)
    with open_draft(tmp_path / "images", "images", {}, {}) as draft:
        with pytest.raises(
            ArtefactError, match=r"images-00000.parquet: the disk is full \([\d.]+ [MG]B free\); make room and run the stage again"
        ):
            draft.write_table("images-00000.parquet", pa.table({"x": [1]}))
        assert [p.name for p in draft.path.iterdir()] == ["scratch"]
    assert not (tmp_path / "images").exists()


def test_a_draft_is_continued_after_a_kill_and_drafts_of_other_params_are_dropped(tmp_path: Path) -> None:
    place = tmp_path / "images"
    with open_draft(place, "images", {"a": 1}, {}) as draft:
        draft.write_json("done.json", 1)
        (draft.path / "half.json.tmp").write_text("ha")
        (draft.scratch / "shard-0000000" / "00003.77.tmp").mkdir(parents=True)
        (draft.scratch / "shard-0000000" / "00003.77.tmp" / "half.tmp").write_text("ha")
        (draft.scratch / "shard-0000000" / "00002").mkdir()
    with open_draft(place, "images", {"a": 1}, {}) as draft:
        assert draft.has("done.json")
        assert not (draft.path / "half.json.tmp").exists()
        assert [path.name for path in (draft.scratch / "shard-0000000").iterdir()] == ["00002"]
    with open_draft(place, "images", {"a": 2}, {}) as draft:
        assert not draft.has("done.json")
        assert len(list((tmp_path / ".work").glob("images-*"))) == 1


MAKE = """
import sys, time
from pathlib import Path
import pyarrow as pa
from ommatid.store import open_draft
with open_draft(Path("images"), "images", {"a": int(sys.argv[1])}, {}, on_wait=lambda line: print(line, flush=True)) as draft:
    if draft.published:
        print("taken", draft.published.rows("images"))
    else:
        print("making", flush=True)
        sys.stdin.readline()
        draft.write_table("images-00000.parquet", pa.table({"x": [1, 2]}))
        draft.seal({})
        draft.publish(Path("images"))
        print("made")
"""


def start(folder: Path, a: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAKE, str(a)]
    return subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


@pytest.mark.parametrize(("second", "end"), [(1, "taken 2"), (2, "making\nmade")])
def test_the_second_of_two_concurrent_runs_waits(tmp_path: Path, second: int, end: str) -> None:
    """It uses what the first published if that is the same artefact, and otherwise makes its own."""
    with start(tmp_path, 1) as first:
        assert line(first) == "making"
        with start(tmp_path, second) as other:
            assert line(other) == "waiting for another process that is making images"
            assert first.communicate("\n")[0].strip() == "made"
            assert other.communicate("\n")[0].strip() == end
    assert open_artefact(tmp_path / "images", "images").manifest.params == {"a": second}


def test_a_run_that_waited_for_a_killed_one_continues(tmp_path: Path) -> None:
    with start(tmp_path, 1) as first:
        assert line(first) == "making"
        with start(tmp_path, 1) as other:
            assert line(other) == "waiting for another process that is making images"
            first.kill()
            assert other.communicate("\n")[0].strip() == "making\nmade"


def write_with_children(place: Path) -> store.Artefact:
    with open_draft(place, "extraction", {"a": 1}, {}) as draft:
        shared = draft.write_table("one/embeddings-00000.parquet", pa.table({"x": [0, 1]}))
        for name in ("one", "two"):
            train = draft.write_table(f"{name}/train-00000.parquet", pa.table({"x": [1, 2, 3]}))
            if name == "two":
                assert draft.share("one/embeddings-00000.parquet", "two/embeddings-00000.parquet").sha256 == shared.sha256
            child = draft.child(name, "activations")
            assert child.scratch == draft.scratch
            assert child.describe("train-00000.parquet") == replace(train, name="train-00000.parquet")
            child.seal({"name": name})
        draft.write_table("plan.parquet", pa.table({"shard": [0]}))
        draft.seal({})
        return draft.publish(place)


def test_children_are_whole_artefacts(tmp_path: Path) -> None:
    top = write_with_children(tmp_path / "activations")
    assert top.children == ["one", "two"]
    assert [file.name for file in top.manifest.files] == ["one/manifest.json", "plan.parquet", "two/manifest.json"]
    top.verify()
    for name in top.children:
        child = top.child(name, "activations")
        assert child.summary == {"name": name}
        assert child.tables == ["embeddings", "train"]
        assert child.manifest.params == {"a": 1}
        assert open_artefact(top.path / name, "activations").digest == child.digest
    with pytest.raises(ArtefactError, match=r"activations: has no 'three' inside; it has one, two"):
        top.child("three", "activations")


def test_a_shared_file_is_on_the_disk_once(tmp_path: Path) -> None:
    top = write_with_children(tmp_path / "activations")
    one, two = (top.path / name / "embeddings-00000.parquet" for name in top.children)
    assert one.samefile(two)
    assert not list(top.path.rglob("*.tmp"))


def test_sharing_is_idempotent_and_copies_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_draft(tmp_path / "activations", "extraction", {}, {}) as draft:
        draft.write_json("one/a.json", 1)
        for _ in range(2):
            draft.share("one/a.json", "two/a.json")
        assert (draft.path / "one/a.json").samefile(draft.path / "two/a.json")

        def no_links(*args: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_links)
        draft.share("one/a.json", "two/a.json")
        assert not (draft.path / "one/a.json").samefile(draft.path / "two/a.json")
        assert [p.name for p in (draft.path / "two").iterdir()] == ["a.json"]


def test_damage_to_children_is_named(tmp_path: Path) -> None:
    top = write_with_children(tmp_path / "activations")
    train = top.path / "two" / "train-00000.parquet"
    content = train.read_bytes()
    train.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
    with pytest.raises(ArtefactError, match=r"two/train-00000.parquet: checksum differs"):
        top.verify()
    train.unlink()
    with pytest.raises(ArtefactError, match=r"two/train-00000.parquet: missing"):
        top.verify()
    manifest = top.path / "one" / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(values))
    with pytest.raises(ArtefactError, match=r"one/manifest.json: \d+ bytes, the manifest says"):
        open_artefact(top.url, "extraction")
    manifest.unlink()
    with pytest.raises(ArtefactError, match=r"one/manifest.json: missing"):
        open_artefact(top.url, "extraction")


def test_a_replaced_child_and_one_of_a_newer_version_are_refused(tmp_path: Path) -> None:
    top = write_with_children(tmp_path / "activations")
    manifest = top.path / "one" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text((top.path / "two" / "manifest.json").read_text())  # whole, and of the same size
    with pytest.raises(ArtefactError, match=r"one/manifest.json: checksum differs"):
        top.child("one", "activations")
    manifest.write_text(text.replace('"name": "one"', '"name": "two"'))
    with pytest.raises(ArtefactError, match=r"one/manifest.json: damaged, or not a manifest \(its checksum differs\)"):
        top.child("one", "activations")
    newer = json.loads(text) | {"schema_version": 99, "unheard_of": 1}
    manifest.write_text(json.dumps(newer))
    with pytest.raises(ArtefactError, match=r"one: written with schema version 99, but this code reads \d+; run the stage again"):
        top.child("one", "activations")


def test_files_that_workers_described_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_draft(tmp_path / "images", "images", {}, {}) as draft:
        worker = pickle.loads(pickle.dumps(store.Draft.attach(draft.url)))
        files = [worker.write_table(part_name("images", i), pa.table({"x": [i]})) for i in range(3)]
        worker.write_json("receipts/0.json", [asdict(file) for file in files])
        assert draft.names("receipts") == ["receipts/0.json"]
        given = [store.File(**values) for values in draft.read_json("receipts/0.json")]
        draft.write_json("cfg.json", 1)
        read: list[str] = []
        monkeypatch.setattr("ommatid.store.draft.describe_in", lambda folder, name: read.append(name))
        made = draft.seal({}, given)
        monkeypatch.undo()
        assert read == []
        assert [file.name for file in made.manifest.files] == ["cfg.json", *(file.name for file in given)]
        published = draft.publish(tmp_path / "images")
    published.verify()
    assert not (published.path / "receipts").exists()


def test_a_description_of_a_missing_file_is_refused(tmp_path: Path) -> None:
    with open_draft(tmp_path / "images", "images", {}, {}) as draft:
        file = draft.write_table("images-00000.parquet", pa.table({"x": [1]}))
        with pytest.raises(ArtefactError, match=r"images-00001.parquet: missing; images-00000.parquet: \d+ bytes, the manifest says 7"):
            draft.seal({}, [replace(file, bytes=7), replace(file, name="images-00001.parquet")])


def test_workers_need_a_draft(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="there is no draft here to write to"):
        store.Draft.attach(str(tmp_path / "none"))


WRITE = """
import sys, time
from ommatid.store import Draft
draft = Draft.attach(sys.argv[1])
print("ready", flush=True)
for i in range(200):
    draft.write_json("shard.json", list(range(2000)))
"""


def test_two_workers_may_write_the_same_file(tmp_path: Path) -> None:
    with open_draft(tmp_path / "images", "images", {}, {}) as draft:
        command = [sys.executable, "-c", WRITE, draft.url]
        workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        assert [line(worker) for worker in workers] == ["ready", "ready"]
        while any(worker.poll() is None for worker in workers):
            if draft.has("shard.json"):
                assert draft.read_json("shard.json") == list(range(2000))
        assert [worker.wait() for worker in workers] == [0, 0]
        for worker in workers:
            assert worker.stdout
            worker.stdout.close()
        assert draft.names() == ["shard.json"]


@pytest.mark.parametrize(("code", "word"), [(errno.EROFS, "read-only file system"), (errno.EACCES, "permission denied")])
def test_a_folder_without_write_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, word: str) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    with open_draft(tmp_path / "images", "images", {}, {}) as draft:
        monkeypatch.setattr("ommatid.store.writer.pq.write_table", refuse)
        with pytest.raises(ArtefactError, match=rf"images-00000.parquet: cannot be written \({word}\); make .* writable for this user"):
            draft.write_table("images-00000.parquet", pa.table({"x": [1]}))
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ArtefactError, match=word), open_draft(tmp_path / "other" / "images", "images", {}, {}):
        pass


def test_a_manifest_holds_one_line_per_file() -> None:
    files = tuple(store.File(part_name("train", i), i, f"{i:064x}", None if i % 2 else i, f"{i:08x}") for i in range(1000))
    manifest = store.Manifest("sae", SCHEMA_VERSION, {"a": [1]}, {}, files, {}, {"n": None})
    text = b"".join(manifest.iter_json())
    assert text.count(b"\n") < 1020
    assert store.Manifest.from_json(text) == manifest
    assert store.Manifest.from_json(b"".join(replace(manifest, files=()).iter_json())).files == ()
