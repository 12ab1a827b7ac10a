"""The stage keeps its contract: rows follow the schema, the split follows the id, and the bytes are always the same.

This holds even after the stage was killed at any step, interrupted, or stopped by a full disk.
"""

import contextlib
import errno
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ommatid.config import FolderSource, ParquetSource, WebDatasetSource
from ommatid.errors import ArtefactError
from ommatid.events import Warned
from ommatid.images import dataset, stage
from ommatid.images.dataset import split_of
from ommatid.images.examine import Seen, look
from ommatid.images.source import open_source, spread
from ommatid.images.stage import run as make_images
from ommatid.schemas import IMAGES, REJECTED
from ommatid.store import open_artefact


@pytest.fixture
def photos(tmp_path: Path, png) -> Path:
    """30 files in three classes: 24 images, 3 duplicates of `a/00.png`, and 3 files that are not images."""
    root = tmp_path / "photos"
    for i in range(30):
        path = root / "abc"[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes({4: png(0), 5: b"text"}.get(i % 10, png(i)))
    return root


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(dataset, "ROWS_PER_PART", 5)
    monkeypatch.setattr("ommatid.store.draft._code_digest", lambda: "the same")  # whoever edits the package meanwhile


def source(root: Path) -> dict[str, str]:
    return {"kind": "folder", "path": str(root)}


def test_rows_follow_the_schema_and_hold_the_files_bytes(photos, make):
    artefact = make(source(photos))
    for path in artefact.files("images"):
        assert pq.read_schema(path).equals(IMAGES, check_metadata=True)
    assert artefact.read("rejected").schema.equals(REJECTED, check_metadata=True)
    rows = artefact.read("images").to_pylist()
    assert [row["image"] for row in rows] == list(range(24))
    for row in rows:
        data = (photos / row["path"]).read_bytes()
        assert row["encoded"] == data
        assert row["image_id"] == hashlib.sha256(data).hexdigest()
        assert (row["width"], row["height"]) == (40, 24)
        assert row["split"] == ("eval" if int(row["image_id"][:8], 16) / 2**32 < 0.3 else "train")


def test_the_summary_counts_what_the_tables_hold(photos, make):
    artefact = make(source(photos))
    splits = artefact.read("images", ["split"])["split"].to_pylist()
    assert artefact.summary == {
        "n_seen": 30,
        "n_images": 24,
        "n_train": splits.count("train"),
        "n_eval": splits.count("eval"),
        "n_duplicates": 3,
        "n_rejected": 3,
        "rejected_share": 0.1,
        "n_nearly_black": 0,
        "n_nearly_white": 0,
        "n_of_several_frames": 0,
        "labels": {"a": 8, "b": 8, "c": 8},
    }


def test_thumbnails_are_upright_webp_of_the_longest_side_and_never_enlarged(tmp_path, encode, pixels, make):
    root = tmp_path / "photos"
    root.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    (root / "1.png").write_bytes(encode(pixels(0, 80, 160), exif=exif))
    (root / "2.png").write_bytes(encode(pixels(1, 16, 8)))
    (root / "3.png").write_bytes(encode(np.zeros((1, 4000, 3), np.uint8)))
    rows = make(source(root)).read("images").to_pylist()
    thumbnails = [Image.open(io.BytesIO(row["thumbnail"])) for row in rows]
    assert [(row["width"], row["height"]) for row in rows] == [(80, 160), (8, 16), (4000, 1)]
    assert [(image.format, image.mode, image.size) for image in thumbnails] == [
        ("WEBP", "RGB", (16, 32)),
        ("WEBP", "RGB", (8, 16)),
        ("WEBP", "RGB", (32, 1)),
    ]


def test_parts_and_row_groups_are_bounded(photos, make, monkeypatch, png):
    monkeypatch.setattr(dataset, "ROWS_PER_PART", 10)
    assert [pq.read_metadata(path).num_rows for path in make(source(photos)).files("images")] == [10, 10, 4]
    monkeypatch.setattr(dataset, "BYTES_PER_PART", 3 * len(png(1)))
    assert all(pq.read_metadata(path).num_rows <= 3 for path in make(source(photos)).files("images"))
    assert dataset.PARQUET["row_group_size"] <= 512


def test_encoded_bytes_are_stored_as_they_are(photos, make):
    (path,) = make(source(photos)).files("images")
    group = pq.read_metadata(path).row_group(0)
    codecs = {group.column(i).path_in_schema: group.column(i).compression for i in range(group.num_columns)}
    assert codecs["encoded"] == codecs["thumbnail"] == "UNCOMPRESSED"
    assert codecs["path"] == "ZSTD"


def test_a_folder_of_text_files_gives_an_artefact_without_rows(tmp_path, make):
    root = tmp_path / "texts"
    root.mkdir()
    for name in ("a.txt", "b.txt"):
        (root / name).write_text(name)
    artefact = make(source(root))
    assert artefact.read("images").schema.equals(IMAGES)
    assert artefact.rows("images") == 0
    assert artefact.summary["rejected_share"] == 1.0
    assert (artefact.summary["n_images"], artefact.summary["n_rejected"], artefact.summary["labels"]) == (0, 2, {})
    assert set(artefact.read("rejected")["reason"].to_pylist()) == {"not_an_image"}


@pytest.mark.parametrize("names", [["one.png"], ["one.png", "two.png"]], ids=["one", "two identical"])
def test_identical_images_are_kept_once(names, tmp_path, png, make):
    root = tmp_path / "few"
    root.mkdir()
    for name in names:
        (root / name).write_bytes(png(0))
    summary = make(source(root)).summary
    assert (summary["n_images"], summary["n_duplicates"], summary["n_rejected"]) == (1, len(names) - 1, 0)
    assert sorted((summary["n_train"], summary["n_eval"])) == [0, 1]


def test_a_limit_exchanges_one_image_at_most_when_a_file_comes_or_goes(photos, make, png):
    def chosen():
        artefact = make(source(photos), limit=6)
        assert artefact.summary["n_seen"] == 6
        found = artefact.read("images")["path"].to_pylist() + artefact.read("rejected")["path"].to_pylist()
        assert len(set(found)) == 6
        return set(found)

    before = first = chosen()
    for i in range(12):
        (photos / f"0{i}.png").write_bytes(png(100 + i))  # before all others
        after = chosen()
        assert len(before - after) <= 1
        before = after
    assert before != first
    for name in sorted(before):
        (photos / name).unlink()
        after = chosen()
        assert len(before - after) == 1 and name not in after
        before = after


def test_names_of_items_are_their_paths(tmp_path, photos, png):
    (tmp_path / "shards").mkdir()
    for shard in "ab":
        with tarfile.open(tmp_path / f"shards/{shard}.tar", "w") as tar:
            for i in range(3):
                info = tarfile.TarInfo(f"x/{i}.png")
                info.size = len(png(i))
                tar.addfile(info, io.BytesIO(png(i)))
    whole = (tmp_path / "shards/a.tar").read_bytes()
    (tmp_path / "shards/a.tar").write_bytes(whole[:1500])  # broken
    (tmp_path / "rows").mkdir()
    for name in ("one", "two"):
        pq.write_table(pa.table({"image": [png(i) for i in range(5)]}), tmp_path / f"rows/{name}.parquet", row_group_size=2)
    sources = [
        FolderSource(kind="folder", path=str(photos)),
        WebDatasetSource(kind="webdataset", path=str(tmp_path / "shards")),
        ParquetSource(kind="parquet", path=str(tmp_path / "rows")),
    ]
    for opened in map(open_source, sources):
        assert list(opened.names() or ()) == [item.path for item in opened.iter_items(range(opened.total))]


@pytest.mark.parametrize(("total", "limit"), [(10, None), (10, 10), (10, 99), (10, 3), (60_000, 10_000), (7, 1)])
def test_spread_positions_ascend_without_gaps_that_differ_by_more_than_one(total, limit):
    positions = list(spread(total, limit))
    assert len(positions) == min(total, limit or total)
    gaps = np.diff([*positions, total])
    assert positions[0] == 0 and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_the_split_keeps_its_share_and_never_moves_an_image_back():
    ids = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(4000)]
    small, large = ({id_ for id_ in ids if split_of(id_, share) == "eval"} for share in (0.3, 0.5))
    assert abs(len(small) / len(ids) - 0.3) < 0.03
    assert small < large


def test_two_runs_give_the_same_bytes(photos, make, checksums, small_parts):
    assert checksums(make(source(photos), "first").path) == checksums(make(source(photos), "second").path)


def test_progress_ends_at_the_total(photos, tmp_path, params, drafting):
    events = []
    chosen = params(source(photos))
    with drafting(tmp_path / "artefact", chosen) as draft:
        make_images(chosen, {}, draft, events.append)
    assert (events[-1].what, events[-1].done, events[-1].total) == ("images", 30, 30)


def test_dark_bright_and_multi_page_images_are_counted_and_reported(tmp_path, encode, pixels, params, drafting, small_parts, monkeypatch):
    root = tmp_path / "photos"
    root.mkdir()
    frames = [Image.fromarray(pixels(seed)) for seed in range(3)]
    files = {
        "a.png": encode(pixels()),
        "night.png": encode(np.full((9, 9), 4095, np.uint16)),  # the lightest grey of 12 bits
        "fog.png": encode(np.full((9, 9), 250, np.uint8)),
    }
    files |= {f"m.{kind}": encode(frames[0], kind, save_all=True, append_images=frames[1:]) for kind in ("gif", "tiff", "webp")}
    for name, content in files.items():
        (root / name).write_bytes(content)
    monkeypatch.setattr(dataset, "ROWS_PER_PART", 2)
    chosen, events = params(source(root)), []
    with drafting(tmp_path / "artefact", chosen) as draft:
        for stopped in (True, False):  # the counts of a run that died go on
            written = []
            monkeypatch.setattr(dataset.Collection, "_write_part", counting(dataset.Collection._write_part, written, 2 if stopped else 9))
            with contextlib.suppress(KeyboardInterrupt):
                summary = make_images(chosen, {}, draft, events.append).summary
    assert (summary["n_nearly_black"], summary["n_nearly_white"], summary["n_of_several_frames"]) == (1, 1, 3)
    assert [event.what.partition(";")[0] for event in events if isinstance(event, Warned)] == [
        "1 of 6 images is nearly black",
        "1 of 6 images is nearly white",
        "3 of 6 images are from files with several frames or pages, of which only the first is used",
    ]


def counting(write, written, most):
    def write_or_stop(self):
        write(self)
        written.append(1)
        if len(written) == most:
            raise KeyboardInterrupt

    return write_or_stop


DYING = """
import os, sys
from pathlib import Path
from ommatid.config import ImagesParams
from ommatid import store
from ommatid.images import dataset
from ommatid.images.stage import run as make_images
place, params, when, name = Path(sys.argv[1]), ImagesParams.model_validate_json(sys.argv[2]), sys.argv[3], sys.argv[4]
dataset.ROWS_PER_PART = 5
store.draft._code_digest = lambda: "the same"
replace = os.replace
def replace_or_die(aside, path):
    if when == "before" and Path(path).name == name:
        os._exit(9)
    replace(aside, path)
    if when == "after" and Path(path).name == name:
        os._exit(9)
os.replace = replace_or_die
with store.open_draft(place, "images", params.identity(), {}) as draft:
    make_images(params, {}, draft)
"""


def die(place: Path, params, when: str, name: str) -> None:
    """Run the stage in a process that dies just before or after the file `name` is renamed into place."""
    done = subprocess.run([sys.executable, "-c", DYING, str(place), params.model_dump_json(), when, name], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr


def test_a_run_killed_at_every_step_ends_with_the_same_bytes(photos, tmp_path, make, params, checksums, small_parts):
    whole = checksums(make(source(photos), "whole").path)
    place = tmp_path / "killed"
    for when, name in [
        ("before", "images-00000.parquet"),
        ("after", "images-00001.parquet"),
        ("before", "rejected.parquet"),
        ("before", "manifest.json"),
    ]:
        die(place, params(source(photos)), when, name)
        assert not place.exists()
    assert checksums(make(source(photos), "killed").path) == whole


@pytest.fixture
def interrupt(tmp_path, params, drafting, monkeypatch):
    """Stops the stage by Ctrl-C after some items: `interrupt(source, place, 17)` returns the names of the finished parts."""

    def interrupted(source: dict[str, str], place: str, n_items: int) -> list[str]:
        def stop(event):
            if event.done == n_items:
                raise KeyboardInterrupt

        monkeypatch.setattr(stage, "_ITEMS_PER_EVENT", 1)
        chosen = params(source)
        with drafting(tmp_path / place, chosen) as draft, pytest.raises(KeyboardInterrupt):
            make_images(chosen, {}, draft, stop)
        return sorted(path.name for path in draft.path.glob("*.parquet"))

    return interrupted


def test_finished_parts_are_not_made_again(photos, make, interrupt, small_parts, monkeypatch):
    assert interrupt(source(photos), "continued", 17) == ["images-00000.parquet", "images-00001.parquet"]
    written = []
    write = pq.write_table
    monkeypatch.setattr(pq, "write_table", lambda table, path, **options: written.append(Path(path).name) or write(table, path, **options))
    make(source(photos), "continued")
    assert [name.partition(".")[0] for name in written] == ["images-00002", "images-00003", "images-00004", "rejected"]


def test_a_draft_of_a_changed_source_is_begun_anew(photos, make, interrupt, checksums, small_parts, png):
    interrupt(source(photos), "continued", 17)
    (photos / "a" / "000.png").write_bytes(png(99))
    assert checksums(make(source(photos), "continued").path) == checksums(make(source(photos), "whole").path)


def test_a_full_disk_leaves_no_artefact_and_the_next_run_continues(
    photos, tmp_path, make, params, drafting, checksums, small_parts, monkeypatch
):
    whole = checksums(make(source(photos), "whole").path)
    chosen = params(source(photos))
    write = pq.write_table

    def full(table, path, **options):
        if Path(path).name.startswith("images-00002"):
            Path(path).write_bytes(b"half of a part")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(table, path, **options)

    monkeypatch.setattr(pq, "write_table", full)
    with drafting(tmp_path / "full", chosen) as draft, pytest.raises(ArtefactError, match="the disk is full"):
        make_images(chosen, {}, draft)
    assert draft.sealed() is None
    assert not list(draft.path.rglob("*.tmp"))
    assert sorted(path.name for path in draft.path.glob("*.parquet")) == ["images-00000.parquet", "images-00001.parquet"]
    monkeypatch.setattr(pq, "write_table", write)
    assert checksums(make(source(photos), "full").path) == whole


def test_the_artefact_verifies(photos, make):
    artefact = make(source(photos))
    artefact.verify()
    assert json.loads((artefact.path / "manifest.json").read_text())["params"]["source"] == source(photos)
    assert open_artefact(artefact.path, "images").digest == artefact.digest


def test_a_hot_pixel_does_not_hide_that_a_picture_is_dark(encode):
    dark = np.full((64, 64), 4095, np.uint16)
    dark[3, 4] = 65535
    seen = look(encode(dark), 96)
    assert isinstance(seen, Seen) and seen.remarks == ("n_nearly_black",)
