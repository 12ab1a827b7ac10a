"""Proves on a real S3 server that artefacts there are whole or absent, as on a disk, and that errors say what to do."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import s3fs

from ommatid import store
from ommatid.errors import ArtefactError
from ommatid.store import Artefact, Draft, File, open_artefact, open_draft, part_name
from ommatid.store import draft as draft_module
from ommatid.store.filesystem import open_folder, remote
from support.processes import HANG_SECONDS
from support.servers import free_port

PARTS = 3


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put scratch files, locks and copies below the current folder."""
    monkeypatch.chdir(tmp_path)


def fill(draft: Draft, n: int = 10) -> Artefact:
    for i in range(PARTS):
        draft.write_table(part_name("images", i), pa.table({"x": list(range(n)), "y": [f"{i}"] * n}), row_group_size=4)
    draft.write_json("cfg.json", {"b": 2})
    return draft.seal({"n": PARTS * n})


def write(place: str, n: int = 10, params: dict[str, object] | None = None) -> Artefact:
    with open_draft(place, "images", params or {"a": 1}, {}) as draft:
        fill(draft, n)
        return draft.publish(place)


def names(url: str) -> list[str]:
    return sorted(entry.name for entry in remote.Remote(url).entries())


def test_artefacts_have_the_same_bytes_as_on_a_disk(s3: str, tmp_path: Path) -> None:
    artefact, local = write(f"{s3}/images"), write(str(tmp_path / "images"))
    assert artefact.digest == local.digest
    again = open_artefact(f"{s3}/images", "images")
    assert again.manifest == local.manifest
    again.verify()
    assert again.read("images").equals(local.read("images"))
    assert list(again.row_groups("images")) == list(local.row_groups("images")) == [[4, 4, 2]] * PARTS
    assert [batch.to_pydict() for batch in again.iter_batches("images", ["x"], 3)] == [
        batch.to_pydict() for batch in local.iter_batches("images", ["x"], 3)
    ]
    with again.open_part("images-00001.parquet") as file:
        assert file.read_row_group(2, ["x", "y"]).to_pydict() == {"x": [8, 9], "y": ["1", "1"]}


def test_nothing_is_left_beside_the_artefact(s3: str, tmp_path: Path) -> None:
    write(f"{s3}/images")
    assert names(s3) == ["images/cfg.json", *(f"images/{part_name('images', i)}" for i in range(PARTS)), "images/manifest.json"]
    left = [path.name for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert sorted(left) == ["images.lock", "images.published"]


def test_files_and_path_return_local_copies_made_once(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact = write(f"{s3}/images")
    assert [path.name for path in artefact.files("images")] == [part_name("images", i) for i in range(PARTS)]
    assert store.read_part(artefact.files("images")[2]).equals(artefact.read_part("images-00002.parquet"))
    assert sorted(path.name for path in artefact.path.iterdir()) == ["cfg.json", *artefact.parts("images")]
    monkeypatch.setattr(remote.Remote, "fetch", lambda *args: pytest.fail("fetched again"))
    artefact.file("cfg.json")
    artefact.file("images-00000.parquet")


def test_a_copy_of_a_changed_file_is_refused(s3: str) -> None:
    artefact = write(f"{s3}/images")
    put(f"{s3}/images", "cfg.json", b"1" * len(open_folder(f"{s3}/images").read_bytes("cfg.json")))
    with pytest.raises(ArtefactError, match=r"images/cfg.json: checksum differs"):
        artefact.file("cfg.json")
    assert not list(Path("data/.cache").rglob("*cfg*"))
    with pytest.raises(ArtefactError, match=r"damaged \(1\): cfg.json: checksum differs; delete what is there and make it again"):
        open_artefact(f"{s3}/images", "images").verify()


def put(url: str, name: str, content: bytes) -> None:
    path = Path("to-put")
    path.write_bytes(content)
    open_folder(url).put(path, name)


def test_all_damage_is_named_at_once(s3: str) -> None:
    place = f"{s3}/images"
    write(place)
    open_folder(place).remove("images-00000.parquet")
    put(place, "images-00002.parquet", b"PAR1")
    with pytest.raises(ArtefactError, match=r"images-00000.parquet: missing; images-00002.parquet: 4 bytes, the manifest says"):
        open_artefact(place, "images")


def test_missing_and_unfinished_artefacts_are_refused(s3: str) -> None:
    with pytest.raises(ArtefactError, match=rf"{s3}/images: does not exist; make it with `ommatid images --data {s3}`"):
        open_artefact(f"{s3}/images", "images")
    put(f"{s3}/images", "images-00000.parquet", b"PAR1")
    with pytest.raises(ArtefactError, match=r"has no manifest\.json, so it is incomplete"):
        open_artefact(f"{s3}/images", "images")


def test_publishing_replaces_the_old(s3: str) -> None:
    place = f"{s3}/images"
    with open_draft(place, "images", {"a": 0}, {}) as draft:
        draft.write_json("only-old.json", 1)
        draft.seal({})
        draft.publish(place)
    assert write(place, n=20, params={"a": 2}).rows("images") == 60
    assert names(s3) == ["images/cfg.json", *(f"images/{part_name('images', i)}" for i in range(PARTS)), "images/manifest.json"]
    open_artefact(place, "images").verify()


@pytest.mark.parametrize("dies_at", range(9))
def test_a_run_that_dies_while_publishing_leaves_a_whole_artefact(s3: str, monkeypatch: pytest.MonkeyPatch, dies_at: int) -> None:
    """Readers find the old artefact, the new one, or none; the next run completes it."""
    place = f"{s3}/images"
    old = write(place)
    left = iter(range(dies_at, -1, -1))

    def dying(method: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            if next(left, 0) == 0:
                raise KeyboardInterrupt
            return method(*args, **kwargs)

        return called

    filesystem = open_folder(place)._fs  # pyright: ignore[reportAttributeAccessIssue]
    with open_draft(place, "images", {"a": 2}, {}) as draft:
        new = fill(draft, 20)
        with monkeypatch.context() as patch:
            for name in ("call_s3", "rm"):
                patch.setattr(filesystem, name, dying(getattr(filesystem, name)))
            try:
                draft.publish(place)
                died = False
            except KeyboardInterrupt:
                died = True
    try:
        found = open_artefact(place, "images")
        found.verify()
        assert found.digest in (old.digest, new.digest)
    except ArtefactError as error:
        assert "no manifest.json" in str(error)
    assert died or found.digest == new.digest
    with open_draft(place, "images", {"a": 2}, {}) as draft:
        made = draft.sealed() or fill(draft, 20)
        assert made.digest == new.digest
        draft.publish(place).verify()
    assert names(s3) == ["images/cfg.json", *(f"images/{part_name('images', i)}" for i in range(PARTS)), "images/manifest.json"]


DYING = """
import os, signal, sys
import pyarrow as pa
from ommatid.store import open_draft, part_name
with open_draft(sys.argv[1], "images", {"a": 1}, {}) as draft:
    for i in range(3):
        if i == 2:
            print("two are there", flush=True)
            sys.stdin.readline()
        draft.write_table(part_name("images", i), pa.table({"x": [i] * 10}))
"""


def test_a_killed_run_continues(s3: str) -> None:
    place = f"{s3}/images"
    command = [sys.executable, "-c", DYING, place]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"two are there\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    with open_draft(place, "images", {"a": 1}, {}) as draft:
        assert [draft.has(part_name("images", i)) for i in range(3)] == [True, True, False]
        assert draft.names() == ["images-00000.parquet", "images-00001.parquet"]
        assert draft.read("images-00001.parquet", columns=["x"])["x"].to_pylist() == [1] * 10
        assert store.read_part(draft.local("images-00001.parquet")).num_rows == 10
        draft.write_table("images-00002.parquet", pa.table({"x": [2] * 10}))
        draft.seal({})
        draft.publish(place).verify()
    with open_draft(place, "images", {"a": 2}, {}) as draft:
        assert draft.names() == []


def test_drafts_of_other_params_are_dropped(s3: str) -> None:
    for a in (1, 2):
        with open_draft(f"{s3}/images", "images", {"a": a}, {}) as draft:
            draft.write_json("done.json", a)
    assert [name.rpartition("/")[2] for name in names(s3)] == [".open", "done.json"]
    with open_draft(f"{s3}/images", "images", {"a": 2}, {}) as draft:
        assert draft.read_json("done.json") == 2
        draft.discard()
    assert names(s3) == []


@pytest.mark.parametrize("a", [1, 2])
def test_a_draft_that_another_machine_takes_over_is_noticed(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, a: int) -> None:
    """The other machine has its own lock, and makes the same artefact or another one."""
    with open_draft(f"{s3}/images", "images", {"a": 1}, {}) as draft:
        draft.write_json("cfg.json", 1)
        with monkeypatch.context() as patch:
            patch.setattr("ommatid.store.workspace.WORK", tmp_path / "other machine")
            other = write(f"{s3}/images", params={"a": a})
        with pytest.raises(ArtefactError, match="this draft was published or removed by another machine"):
            fill(draft)
    assert open_artefact(f"{s3}/images", "images").digest == other.digest


def test_a_draft_taken_over_while_receipts_and_children_are_written_is_noticed(
    s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with open_draft(f"{s3}/activations", "extraction", {"a": 1}, {}) as draft:
        draft.write_json("receipts/0.json", 1)
        file = draft.child("one", "activations").write_table("train-00000.parquet", pa.table({"x": [1]}))
        with monkeypatch.context() as patch:
            patch.setattr("ommatid.store.workspace.WORK", tmp_path / "other machine")
            with open_draft(f"{s3}/activations", "extraction", {"a": 2}, {}):
                pass
        for use in (
            lambda: draft.read_json("receipts/0.json"),
            lambda: list(draft.iter_json(["receipts/0.json"])),
            lambda: draft.read("one/train-00000.parquet"),
            lambda: draft.child("one", "activations").seal({}, [file]),
        ):
            with pytest.raises(ArtefactError, match=r"activations-[0-9a-f]{16}: this draft was published or removed by another machine"):
                use()


def test_a_worker_removes_what_others_left_on_its_machine(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = []
    for a in (1, 2):
        with open_draft(f"{s3}/images", "images", {"a": a}, {}) as draft, monkeypatch.context() as patch:
            patch.setattr("ommatid.store.workspace.WORK", tmp_path / "worker's machine")
            here.append(Draft.attach(draft.url).scratch)
            (here[-1] / "shard-0000000").mkdir()
            Draft.attach(draft.url)
    assert [path.exists() for path in here] == [False, True]
    assert (here[1] / "shard-0000000").exists()


WORKER = """
import json, pickle, sys
from dataclasses import asdict
import pyarrow as pa
draft = pickle.loads(bytes.fromhex(sys.argv[1]))
i = int(sys.argv[2])
file = draft.write_table(f"one/train-{i:05d}.parquet", pa.table({"x": [i]}))
both = draft.write_table(f"one/embeddings-{i:05d}.parquet", pa.table({"x": [-i]}))
draft.share(both.name, f"two/embeddings-{i:05d}.parquet")
draft.write_table(f"two/train-{i:05d}.parquet", pa.table({"x": [i]}))
draft.write_json(f"receipts/{i}.json", [asdict(file), asdict(both)])
"""


def test_workers_in_other_processes_write_parts_and_children(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = f"{s3}/activations"
    with open_draft(place, "extraction", {}, {}) as draft:
        hold = pickle.dumps(Draft.attach(draft.url)).hex()
        for i in range(3):
            subprocess.run([sys.executable, "-c", WORKER, hold, f"{i}"], check=True)
        receipts = draft.names("receipts")
        assert receipts == [f"receipts/{i}.json" for i in range(3)]
        files = [File(**(values | {"name": values["name"][4:]})) for receipt in draft.iter_json(receipts) for values in receipt]
        with monkeypatch.context() as patch:
            read: list[str] = []
            describe_in = draft_module.describe_in
            patch.setattr(draft_module, "describe_in", lambda here, name: read.append(name) or describe_in(here, name))
            draft.child("one", "activations").seal({}, files)
            assert read == []  # what workers described
            draft.child("two", "activations").seal({})
            assert len(read) == 6
        top = draft.seal({})
        assert top.children == ["one", "two"]
        published = draft.publish(place)
    published.verify()
    assert published.child("two", "activations").read("embeddings")["x"].to_pylist() == [0, -1, -2]
    assert not [name for name in names(s3) if "receipts" in name or ".open" in name]
    with pytest.raises(ArtefactError, match="there is no draft here to write to"):
        Draft.attach(draft.url)


def test_large_objects_are_copied_in_parts(s3: str) -> None:
    """They are uploaded in parts, and copied whole by the store."""
    with open_draft(f"{s3}/images", "images", {}, {}) as draft:
        with draft.write_file("one.bin") as path, path.open("wb") as file:
            for i in range(101):  # s3fs sends a file in pieces from 100 MiB on
                file.write(bytes([i]) * 2**20)
        draft.share("one.bin", "two.bin")
        draft.seal({})
        artefact = draft.publish(f"{s3}/images")
    artefact.verify()
    open_folder(f"{s3}/images").remove("")


def test_a_root_may_be_a_bucket_and_names_may_be_unusual(s3: str) -> None:
    place = f"{s3}/mö re/images"
    write(place).verify()
    assert open_folder("s3://bucket").sizes() == {}
    assert s3.rpartition("/")[2] in open_folder("s3://bucket/").folders()


@pytest.fixture
def change(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets environment variables, and makes clients notice them."""

    def forget() -> None:
        remote._filesystem.cache_clear()
        s3fs.S3FileSystem.clear_instance_cache()

    def changed(**variables: str | None) -> None:
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name)
            else:
                monkeypatch.setenv(name, value)
        forget()

    yield changed
    forget()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "x" * 40}, "signature"),
        ({"AWS_ACCESS_KEY_ID": "x" * 20}, "Access Key Id you provided does not exist"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "Unable to locate credentials"),
        ({"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"}, r"http://127.0.0.1:\d+: \[Errno 111\] Connection refused"),
    ],
)
def test_a_store_that_denies_access_is_an_error_that_says_so(
    s3: str, change: Callable[..., None], variables: dict[str, str | None], said: str
) -> None:
    change(AWS_MAX_ATTEMPTS="1", **variables)
    with pytest.raises(ArtefactError, match=said) as caught:
        write(f"{s3}/images")
    assert s3 in str(caught.value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "run the stage again"):
        assert name in str(caught.value)
    if "AWS_ENDPOINT_URL" not in variables:
        with pytest.raises(ArtefactError, match=r"Forbidden|credentials"):
            open_artefact(f"{s3}/images", "images")


def test_a_dead_store_is_reported_within_seconds(s3: str, change: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ANSWER_SECONDS", 0.3)
    with socket.socket() as silent:  # takes connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for endpoint, said in (
            (f"http://127.0.0.1:{free_port()}", "Connection refused"),
            (f"http://127.0.0.1:{silent.getsockname()[1]}", "timed out"),
        ):
            change(AWS_ENDPOINT_URL=endpoint)
            start = time.monotonic()
            with pytest.raises(ArtefactError, match=said):
                open_artefact(f"{s3}/images", "images")
            assert time.monotonic() - start < HANG_SECONDS / 10  # its library tries for two minutes


def test_any_response_shows_that_a_store_is_alive_and_redirects_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(307 if self.path == "/" else 500)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        remote._check_answers(f"http://127.0.0.1:{server.server_port}")
    assert asked == ["/"]


def test_a_missing_bucket_is_named(s3: str) -> None:
    for use in (lambda: write("s3://no-such-bucket/x/images"), lambda: open_artefact("s3://no-such-bucket/x/images", "images")):
        with pytest.raises(ArtefactError, match=r"s3://no-such-bucket/x/.*: there is no such bucket; make it, or correct the URL"):
            use()


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    known = sys.modules["fsspec.registry"]._registry  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.delitem(known, "s3", raising=False)
    with pytest.raises(ArtefactError, match=r"s3://other/x: the library for s3:// is not installed here: pip install 'ommatid\[s3\]'"):
        open_folder("s3://other/x")


@pytest.mark.parametrize(("url", "said"), [("s4://bucket/x", "not a usable URL"), ("s3://bucket/x*", r"must not contain any of \* \?")])
def test_unusable_urls_are_refused(url: str, said: str) -> None:
    with pytest.raises(ArtefactError, match=said):
        open_folder(url)


def test_a_full_disk_here_is_not_the_store_s_fault(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with open_draft(f"{s3}/images", "images", {}, {}) as draft:
        monkeypatch.setattr("ommatid.store.writer.pq.write_table", full)
        with pytest.raises(ArtefactError, match=r"images-00000.parquet: the disk is full"):
            draft.write_table("images-00000.parquet", pa.table({"x": [1]}))


def test_queries_of_a_catalogue_load_no_fsspec() -> None:
    code = "import sys, ommatid.cli, ommatid.cli.query, ommatid.store; assert not {'fsspec', 's3fs', 'aiobotocore'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


def test_descriptions_survive_json() -> None:
    file = File("a", 1, "b", None, "c")
    assert File(**asdict(file)) == file
