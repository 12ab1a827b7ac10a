"""Proves that an artefact is whole or not there: drafts, damage, locks, writers that die."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from ommatid import store
from ommatid.errors import ArtefactError
from ommatid.store import open_artefact, open_draft, part_name

PARTS = 3


def write(place: Path, n: int = 10, params: dict[str, object] | None = None) -> store.Artefact:
    with open_draft(place, "images", params or {"a": 1}, {}) as draft:
        for i in range(PARTS):
            draft.write_table(part_name("images", i), pa.table({"x": list(range(n))}))
        draft.write_json("cfg.json", {"b": 2})
        draft.seal({"n": PARTS * n})
        return draft.publish(place)


def test_round_trip(tmp_path: Path) -> None:
    artefact = write(tmp_path / "images")
    assert artefact.rows("images") == len(artefact.read("images")) == 30
    assert artefact.tables == ["images"]
    assert artefact.summary == {"n": 30}
    assert [len(part) for part in artefact.iter_parts("images")] == [10, 10, 10]
    artefact.verify()
    assert not (tmp_path / ".work" / "scratch").exists()


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


def test_missing_unfinished_other_kind_and_newer_version(tmp_path: Path) -> None:
    place = tmp_path / "images"
    with pytest.raises(ArtefactError, match=r"does not exist; make it with `dvc repro images`"):
        open_artefact(place, "images")
    place.mkdir()
    with pytest.raises(ArtefactError, match=r"no manifest\.json, so it is not whole"):
        open_artefact(place, "images")
    write(place)
    with pytest.raises(ArtefactError, match="holds images, expected sae"):
        open_artefact(place, "sae")
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(ArtefactError, match="schema version 99"):
        open_artefact(place, "images")
    (place / "manifest.json").write_text("{")
    with pytest.raises(ArtefactError, match="not a manifest"):
        open_artefact(place, "images")


def test_publishing_replaces_the_old(tmp_path: Path) -> None:
    write(tmp_path / "images", n=10)
    assert write(tmp_path / "images", n=20, params={"a": 2}).rows("images") == 60
    assert [p.name for p in (tmp_path / ".work").iterdir()] == ["images.lock"]


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(table: pa.Table, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.pq, "write_table", full)
    with open_draft(tmp_path / "images", "images", {}, {}) as draft:
        with pytest.raises(
            ArtefactError, match=r"images-00000.parquet: the disk is full \(\d+ MB free\); make room and run the stage again"
        ):
            draft.write_table("images-00000.parquet", pa.table({"x": [1]}))
        assert [p.name for p in draft.path.iterdir()] == ["scratch"]
    assert not (tmp_path / "images").exists()


def test_a_draft_goes_on_after_kill_and_others_are_dropped(tmp_path: Path) -> None:
    place = tmp_path / "images"
    with open_draft(place, "images", {"a": 1}, {}) as draft:
        draft.write_json("done.json", 1)
        (draft.path / "half.json.tmp").write_text("ha")
    with open_draft(place, "images", {"a": 1}, {}) as draft:
        assert draft.has("done.json")
        assert not (draft.path / "half.json.tmp").exists()
    with open_draft(place, "images", {"a": 2}, {}) as draft:
        assert not draft.has("done.json")
        assert len(list((tmp_path / ".work").glob("images-*"))) == 1


def test_two_writers_of_one_artefact(tmp_path: Path) -> None:
    with open_draft(tmp_path / "images", "images", {}, {}):
        code = "from ommatid.store import *\nfrom pathlib import Path\nwith open_draft(Path('images'), 'images', {}, {}): pass"
        other = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "ArtefactError: images: another process is making it now" in other.stderr
