"""Images decoded by the workers of a cluster give the same bytes as those decoded here, where nothing is decoded then.

This holds if a worker dies, and for what cannot be decoded.
"""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Client

import ommatid
from ommatid.config import ImagesParams
from ommatid.errors import ExecutorError
from ommatid.events import Progress
from ommatid.images import examine, workers
from ommatid.images.stage import run
from ommatid.store import Artefact, open_draft
from ommatid.store.filesystem import disk, listing
from support.processes import HANG_SECONDS
from support.servers import dask_scheduler, dask_workers
from support.tiles import write_tile_folder

N_IMAGES = 40
SOURCE = str(Path(ommatid.__file__).parents[1])
"""Folder from which workers import the same code as this process."""


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images in a folder that only the driver is in, whose files are old enough to be remembered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(listing, "SETTLED_NS", -(10**9))
    monkeypatch.setattr(workers, "PER_SHARD", 5)
    write_tile_folder(tmp_path / "photos", N_IMAGES)
    (tmp_path / "photos/red/text.png").write_bytes(b"text")
    (tmp_path / "photos/red/again.png").write_bytes((tmp_path / "photos/red/0000.png").read_bytes())
    return Path("photos")


def make(place: str, monkeypatch: pytest.MonkeyPatch, on_event: Callable[[Any], None], executor: Any, **changes: Any) -> Artefact:
    """Run the stage with a cache of its own."""
    monkeypatch.setenv("OMMATID_CACHE", str(Path(place).absolute() / "cache"))
    values = {"source": {"kind": "folder", "path": "photos"}, "limit": None, "eval_share": 0.3, "max_rejected": 0.1, "thumbnail": 32}
    params = ImagesParams.model_validate(values | {"executor": executor} | changes)
    with open_draft(Path(place, "images"), "images", params.identity(), {}) as draft:
        run(params, {}, draft, on_event)
        return draft.publish(Path(place, "images"))


def test_dask_workers_one_of_which_is_killed_decode_everything_and_the_bytes_are_the_same(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = {"held": False, "referring": True}
    expected = {name: make(name, monkeypatch, lambda event: None, {"kind": "local"}, by_reference=by) for name, by in both.items()}
    seen: list[Progress] = []
    with dask_scheduler() as address, dask_workers(address, tmp_path, SOURCE), Client(address) as client:
        client.wait_for_workers(2, HANG_SECONDS)
        answers: Any = client.run(os.getpid)

        def kill_one(event: Any) -> None:
            if isinstance(event, Progress) and event.what == "images decoded by workers":
                if not seen:
                    os.kill(min(answers.values()), signal.SIGKILL)
                seen.append(event)

        monkeypatch.setattr(examine, "look", fail)
        executor = {"kind": "dask", "address": address, "workers": 1}
        made = {name: make(f"{name}/dask", monkeypatch, kill_one, executor, by_reference=by) for name, by in both.items()}
    assert (seen[-1].done, seen[-1].total) == (N_IMAGES + 2, N_IMAGES + 2)
    for name in both:
        assert (made[name].path / "manifest.json").read_bytes() == (expected[name].path / "manifest.json").read_bytes()
        made[name].verify()


def fail(*_: Any) -> Any:
    raise AssertionError("the driver decodes an image")


def test_a_cluster_that_does_not_answer_is_named_by_the_key_of_this_stage(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExecutorError, match=r"images\.executor\.address: no Dask scheduler answers at tcp://127\.0\.0\.1:9 "):
        make("images", monkeypatch, lambda event: None, {"kind": "dask", "address": "tcp://127.0.0.1:9", "workers": 1})


def test_only_new_images_are_dealt_to_workers(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dealt: list[int] = []
    monkeypatch.setattr(
        "ommatid.executors.run", lambda params, job, shards, on_done: [dealt.append(s) or job(s) or on_done(s) for s in shards]
    )
    executor = {"kind": "dask", "address": None, "workers": 1}
    make("images", monkeypatch, lambda event: None, executor)
    assert dealt == list(range(-(-(N_IMAGES + 2) // 5)))
    dealt.clear()
    make("images", monkeypatch, lambda event: None, executor)
    assert dealt == []
    (photos / "red/new.png").write_bytes((photos / "red/0000.png").read_bytes() + b"\0")
    make("images", monkeypatch, lambda event: None, executor)
    assert dealt == [0]


def test_of_a_source_without_files_workers_decode_only_new_images_and_see_that_it_changed(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []
    look = workers.look
    monkeypatch.setattr(workers, "look", lambda encoded, thumbnail: decoded.append(encoded) or look(encoded, thumbnail))
    monkeypatch.setattr(examine, "look", fail)
    monkeypatch.setattr("ommatid.executors.run", lambda params, job, shards, on_done: [job(s) or on_done(s) for s in shards])
    pictures = [path.read_bytes() for path in sorted((photos / "red").glob("0*.png"))[:4]]

    def make_of(name: str, rows: list[bytes]) -> Artefact:
        shutil.rmtree("rows", ignore_errors=True)
        Path("rows").mkdir()
        pq.write_table(pa.table({"image": rows}), Path("rows", name))
        source = {"kind": "parquet", "path": "rows"}
        return make("images", monkeypatch, lambda event: None, {"kind": "dask", "address": None, "workers": 1}, source=source)

    make_of("one.parquet", pictures[:3])
    assert sorted(decoded) == sorted(pictures[:3])
    decoded.clear()
    found = make_of("two.parquet", [pictures[3], *pictures[:2]])  # as many rows, in another file
    assert decoded == [pictures[3]]
    assert found.read("images", ["path"])["path"].to_pylist() == [f"two.parquet#{i}" for i in range(3)]


def test_what_workers_find_in_another_file_under_the_same_path_is_not_taken_for_this_one(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_stamp_of", lambda status: f"{status.st_mtime_ns}")
    here = sorted((photos / "red").iterdir())[1]
    content, status = here.read_bytes(), here.stat()

    def work_elsewhere(params: Any, job: Any, shards: Any, on_done: Any) -> None:
        here.write_bytes(content[::-1])
        for shard in shards:
            job(shard)
            on_done(shard)
        here.write_bytes(content)
        os.utime(here, ns=(status.st_atime_ns, status.st_mtime_ns))

    monkeypatch.setattr("ommatid.executors.run", work_elsewhere)
    local, dask = {"kind": "local"}, {"kind": "dask", "address": None, "workers": 1}
    scratch, made = (make(kind["kind"], monkeypatch, lambda event: None, kind, by_reference=True) for kind in (local, dask))
    assert (made.path / "manifest.json").read_bytes() == (scratch.path / "manifest.json").read_bytes()
