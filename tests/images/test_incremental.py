"""A run after a change reads and decodes only what is new, and ends with the bytes of a run from scratch.

This holds for any sequence of changes, for runs that were interrupted, and if the cache or the earlier artefact is damaged or gone.
"""

import contextlib
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ommatid.errors import SourceError
from ommatid.events import Warned
from ommatid.images import dataset, decode, examine, memory, stage
from ommatid.store import open_artefact, open_draft
from ommatid.store.filesystem import Disk, disk, listing

Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "ROWS_PER_PART", 3)
    monkeypatch.setattr(stage, "_ITEMS_PER_EVENT", 2)
    monkeypatch.setattr(listing, "SETTLED_NS", -(10**9))  # files of this test are young, and differ in size
    monkeypatch.setattr("ommatid.store.draft._code_digest", lambda: "the same")  # whoever edits the package meanwhile


class Spy:
    """Counts what is read and decoded from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path):
        self.read: list[str] = []
        self.decoded: set[bytes] = set()
        read, look = Disk.read_bytes, examine.look

        def spy_read(folder: Disk, name: str) -> bytes:
            if folder.path == root:
                self.read.append(name)
            return read(folder, name)

        def spy_look(encoded: bytes, thumbnail: int) -> Any:
            self.decoded.add(encoded)
            return look(encoded, thumbnail)

        monkeypatch.setattr(Disk, "read_bytes", spy_read)
        monkeypatch.setattr(examine, "look", spy_look)

    def take(self) -> tuple[list[str], int]:
        """Return the files read and the number of different contents decoded since it was last called."""
        found = sorted(self.read), len(self.decoded)
        self.read, self.decoded = [], set()
        return found


@pytest.fixture
def content(png: Callable[[int], bytes]) -> Callable[[int], bytes]:
    """Makes the content of a file, each of another size: an image, or for every fifth seed something else."""
    return lambda seed: (b"text" if seed % 5 == 4 else png(seed)).ljust(1000 + seed, b"\0")


@pytest.fixture
def photos(tmp_path: Path, content: Callable[[int], bytes]) -> Path:
    """Seven images and two files that are none, in two classes; `b/07.png` repeats `a/00.png`."""
    root = tmp_path / "photos"
    for i in range(10):
        path = root / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content(0 if i == 7 else i))
    return root


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch, photos: Path) -> Spy:
    return Spy(monkeypatch, photos)


@pytest.fixture
def again(make: Make, photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checksums: Callable[[Path], Any]) -> Iterator[Any]:
    """Runs the stage in the place where it ran before, and returns the artefact; it must equal one from scratch at the end of the test."""
    ran: list[dict[str, Any]] = []

    def run(**changes: Any) -> Any:
        ran.append(changes)
        return make({"kind": "folder", "path": str(photos)}, "images", **changes)

    yield run
    monkeypatch.setenv("OMMATID_CACHE", str(tmp_path / "another cache"))
    scratch = make({"kind": "folder", "path": str(photos)}, "scratch", **ran[-1])
    assert checksums(tmp_path / "images") == checksums(scratch.path)


def test_nothing_is_read_or_decoded_twice(again: Make, spy: Spy) -> None:
    again()
    read, n_decoded = spy.take()
    assert (len(read), n_decoded) == (10, 9)
    again()
    assert spy.take() == ([], 0), "not even those that cannot be decoded"


def test_one_image_more_is_read_and_decoded_alone(again: Make, spy: Spy, photos: Path, content: Callable[[int], bytes]) -> None:
    before = again()
    spy.take()
    (photos / "a" / "000.png").write_bytes(content(50))
    after = again()
    assert spy.take() == (["a/000.png"], 1)
    assert after.summary["n_images"] == before.summary["n_images"] + 1


def test_a_changed_file_is_read_again_although_its_time_was_set_back(
    again: Make, spy: Spy, photos: Path, content: Callable[[int], bytes]
) -> None:
    again()
    status = (photos / "a" / "00.png").stat()
    spy.take()
    (photos / "a" / "00.png").write_bytes(content(60)[: status.st_size])
    os.utime(photos / "a" / "00.png", ns=(status.st_atime_ns, status.st_mtime_ns))
    again()
    assert spy.take() == (["a/00.png"], 1)


def test_content_that_replaced_what_was_listed_is_not_taken_for_it_later(
    again: Make, photos: Path, content: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_stamp_of", lambda status: f"{status.st_mtime_ns}")  # what is put back has the stamp of before, as in S3
    path = photos / "a" / "00.png"
    status, before = path.stat(), path.read_bytes()
    with monkeypatch.context() as patched:
        read = Disk.read_bytes

        def replace_and_read(folder: Disk, name: str) -> bytes:
            if name == "a/00.png":
                path.write_bytes(content(60)[: len(before)])
            return read(folder, name)

        patched.setattr(Disk, "read_bytes", replace_and_read)
        again()
    path.write_bytes(before)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    again()


def test_labels_and_captions_decode_and_read_nothing(again: Make, spy: Spy, photos: Path) -> None:
    again()
    spy.take()
    (photos / "captions.csv").write_text("path,caption,label\na/00.png,seen from above,boat\n")
    assert "boat" in again().summary["labels"]
    assert spy.take() == (["captions.csv"], 0)


def test_a_moved_image_is_read_but_not_decoded(again: Make, spy: Spy, photos: Path) -> None:
    again()
    spy.take()
    (photos / "a" / "02.png").rename(photos / "b" / "02.png")
    again()
    assert spy.take() == (["b/02.png"], 0)


def test_a_removed_image_leaves_nothing_behind(again: Make, spy: Spy, photos: Path) -> None:
    again()
    spy.take()
    (photos / "a" / "00.png").unlink()  # of which b/07.png was a duplicate
    assert "b/07.png" in again().read("images", ["path"])["path"].to_pylist()
    assert spy.take() == ([], 0)


def test_another_thumbnail_or_other_code_decodes_anew(again: Make, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    again()
    spy.take()
    again(thumbnail=16)
    assert spy.take() == (["a/04.png", "b/09.png"], 9), "the bytes of images come from the artefact, those of other files do not"
    again(thumbnail=32)
    assert spy.take() == ([], 0)
    monkeypatch.setattr(examine, "digest_of", lambda *modules: "changed")
    again(thumbnail=32)
    assert spy.take()[1] == 9


def test_an_error_of_reading_is_not_remembered(again: Make, spy: Spy, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        read = Disk.read_bytes
        patch.setattr(Disk, "read_bytes", lambda self, name: fail() if name == "a/02.png" else read(self, name))
        first = again()
    assert first.read("rejected").to_pylist()[0] == {"path": "a/02.png", "reason": "unreadable", "detail": "Input/output error"}
    spy.take()
    assert again().summary["n_images"] == first.summary["n_images"] + 1
    assert spy.take() == (["a/02.png"], 1)


def fail() -> bytes:
    raise OSError(5, "Input/output error")


def test_what_memory_did_not_suffice_for_is_tried_again(again: Make, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(*_: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(decode, "_open", lack)
        assert again().summary["n_images"] == 0
    spy.take()
    assert again().summary["n_images"] == 7


def test_a_file_that_changed_a_moment_ago_is_read_again(again: Make, spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "SETTLED_NS", 10**12)
    again()
    spy.take()
    again()
    read, n_decoded = spy.take()
    assert (len(read), n_decoded) == (10, 0)


@pytest.mark.parametrize("kind", ["gone", "damaged", "no database"])
def test_without_the_cache_everything_is_read_and_decoded(kind: str, again: Make, spy: Spy, tmp_path: Path) -> None:
    again()
    spy.take()
    file = tmp_path / "cache" / memory.FILE
    if kind == "gone":
        file.unlink()
    elif kind == "damaged":
        with contextlib.closing(sqlite3.connect(file)) as database, database:
            database.execute("UPDATE seen SET value = CAST(value || x'00' AS BLOB)")
    else:
        file.write_bytes(b"no database at all".ljust(5000, b"!"))
    again()
    assert spy.take()[1] == 9


def test_a_cache_that_cannot_be_used_is_named(photos: Path, params: Make, drafting: Make, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"a file")
    events: list[Any] = []
    values = params({"kind": "folder", "path": str(photos)})
    with drafting(tmp_path / "images", values) as draft:
        assert stage.run(values, {}, draft, events.append).summary["n_images"] == 7
    (warning,) = (event.what for event in events if isinstance(event, Warned))
    assert f"{tmp_path}/cache/images/seen.sqlite: what earlier runs found in the images cannot be used" in warning


@pytest.mark.parametrize("kind", ["gone", "damaged"])
def test_without_the_earlier_artefact_bytes_are_read_but_not_decoded(kind: str, again: Make, spy: Spy, tmp_path: Path) -> None:
    again()
    spy.take()
    if kind == "gone":
        shutil.rmtree(tmp_path / "images")
    else:
        for path in (tmp_path / "images").glob("images-*.parquet"):
            data = bytearray(path.read_bytes())
            place = data.find(b"IEND")
            data[place] ^= 1
            path.write_bytes(data)
    again()
    read, n_decoded = spy.take()
    assert (len(read), n_decoded) == (8, 0)


def test_the_cache_is_bounded_and_loses_what_was_unused_for_longest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ids = [f"{i:064x}" for i in range(300)]
    for day in range(3):
        monkeypatch.setattr(memory.time, "time", lambda day=day: 86400.0 * day)
        with memory.Memory("settings") as opened:
            for image_id in ids[day * 100 : day * 100 + 100]:
                opened.add(image_id, image_id, memory.Seen(1, 2, bytes(3000)))
            assert opened.find(ids[0]) is not None or not day, "used every day"
    assert (tmp_path / "cache" / memory.FILE).stat().st_size > 900_000
    monkeypatch.setattr(memory, "IMAGES_BYTES", 600_000)
    monkeypatch.setattr(memory, "_REMOVED_AT_ONCE", 10)
    with memory.Memory("settings"):
        pass
    assert 300_000 < (tmp_path / "cache" / memory.FILE).stat().st_size <= 600_000
    with memory.Memory("settings") as opened:
        left = [i for i, image_id in enumerate(ids) if opened.find(image_id)]
        assert left[0] == 0 and left[1] > 100 and left[-100:] == list(range(200, 300))
        assert [i for i, image_id in enumerate(ids) if opened.content_of(image_id)][-100:] == list(range(200, 300))


def test_an_empty_folder_leaves_the_earlier_artefact(again: Make, make: Make, photos: Path, tmp_path: Path) -> None:
    again()
    away = photos.rename(tmp_path / "away")
    photos.mkdir()
    with pytest.raises(SourceError, match=r"photos: there are no files in this folder, hidden ones aside; put some there"):
        make({"kind": "folder", "path": str(photos)}, "images")
    assert open_artefact(tmp_path / "images", "images").summary["n_images"] == 7
    photos.rmdir()
    away.rename(photos)
    again()


Step = tuple[str, int, int]
STEPS = st.tuples(st.sampled_from(["write", "remove", "move", "label", "limit", "stop"]), st.integers(0, 5), st.integers(0, 14))


@given(steps=st.lists(STEPS, min_size=1, max_size=8))
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sequence_of_changes_gives_the_bytes_of_a_run_from_scratch(
    steps: list[Step], content: Callable[[int], bytes], params: Make, checksums: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        root, limit = here / "photos", None
        root.mkdir()
        (root / "first.png").write_bytes(content(99))
        monkeypatch.setenv("OMMATID_CACHE", str(here / "cache"))
        for what, name, value in steps:
            path, stop = root / f"{name}.png", None
            if what == "write":
                path.write_bytes(content(value))
            elif what == "remove":
                path.unlink(missing_ok=True)
            elif what == "move" and path.exists():
                path.rename(root / f"{value % 6}.png")
            elif what == "label":
                (root / "captions.csv").write_text(f"path,label,caption\nfirst.png,{value},\nfirst.png,,again {name}\n")
            elif what == "limit":
                limit = value or None
            elif what == "stop":
                stop = name // 2 * 2
            values = params({"kind": "folder", "path": str(root)}, limit=limit)
            if stop is not None:
                run(here / "images", values, stop)
            run(here / "images", values)
        monkeypatch.setenv("OMMATID_CACHE", str(here / "another cache"))
        run(here / "scratch", values)
        assert checksums(here / "images") == checksums(here / "scratch")


def run(place: Path, values: Any, stop: int | None = None) -> None:
    """Run the stage, or stop it by Ctrl-C after some items."""

    def on_event(event: Any) -> None:
        if stop is not None and getattr(event, "done", None) == stop:
            raise KeyboardInterrupt

    with open_draft(place, "images", values.identity(), {}) as draft, contextlib.suppress(KeyboardInterrupt):
        stage.run(values, {}, draft, on_event)
        draft.publish(place)


def test_tokens_tell_files_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"same")
    found = listing.list_images(tmp_path)
    tokens = [found.token(file, inside) for file in found.files for inside in ("", "1")]
    assert len(set(tokens)) == 4 and all(tokens)
