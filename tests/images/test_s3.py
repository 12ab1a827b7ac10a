"""Images on a real S3 server give the same rows as on a disk: labels, captions, rejected files, Parquet, and a run that continues."""

import io
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ommatid.errors import ArtefactError, SourceError
from ommatid.images.folder import Folder
from ommatid.images.original import OriginalReader
from ommatid.store.filesystem import open_folder
from ommatid.store.filesystem.remote import Remote


@pytest.fixture
def root(tmp_path: Path, png: Callable[[int], bytes]) -> Path:
    """A folder of photographs."""
    files = {
        f"{name}.png": png(seed) for seed, name in enumerate(["b", "dog/2", "dog/1", "dog/poodle/x", "cat/é [1]", ".hidden", ".thumbs/y"])
    }
    files |= {"empty.jpg": b"", "half.png": png(8)[:90], "captions.csv": '\ufeffpath,caption\ndog/1.png,"a dog, asleep"\n'.encode()}
    for name, content in files.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "photos"


def upload(root: Path, url: str) -> None:
    for path in sorted(root.rglob("*")):
        if path.is_file():
            copy = root.parent / "to-put"
            copy.write_bytes(path.read_bytes())
            open_folder(url).put(copy, path.relative_to(root).as_posix())


def test_a_folder_gives_the_same_rows_as_on_a_disk(s3: str, root: Path, make: Callable[..., Any]) -> None:
    upload(root, f"{s3}/photos")
    there, here = (make({"kind": "folder", "path": path}, place) for path, place in ((f"{s3}/photos", "there"), (str(root), "here")))
    assert there.read("images").equals(here.read("images"))
    assert there.read("rejected").equals(here.read("rejected"))
    assert there.read("rejected")["path"].to_pylist() == ["empty.jpg", "half.png"]
    assert there.read("images")["captions"].to_pylist() == [[], [], ["a dog, asleep"], [], []]


def test_the_fingerprint_follows_names_and_contents(s3: str, root: Path) -> None:
    url = f"{s3}/photos"
    upload(root, url)
    first = Folder(url).fingerprint
    assert Folder(url).fingerprint == first
    content = (root / "b.png").read_bytes()
    (root.parent / "other").write_bytes(bytes([content[0] ^ 1]) + content[1:])
    open_folder(url).put(root.parent / "other", "b.png")
    assert Folder(url).fingerprint != first


def test_an_object_that_was_replaced_is_told_from_what_was_listed(s3: str, root: Path) -> None:
    upload(root, f"{s3}/photos")
    folder = Folder(f"{s3}/photos")
    items = list(folder.iter_items(range(folder.total)))
    assert all(item.token and item.is_unchanged() for item in items)
    (root.parent / "other").write_bytes((root / "b.png").read_bytes()[::-1])
    open_folder(f"{s3}/photos").put(root.parent / "other", "b.png")
    assert [item.path for item in items if not item.is_unchanged()] == ["b.png"]


def test_an_object_that_disappears_and_a_missing_bucket_are_errors(s3: str, root: Path) -> None:
    upload(root, f"{s3}/photos")
    (item,) = Folder(f"{s3}/photos").iter_items([0])
    open_folder(f"{s3}/photos").remove(item.path)
    with pytest.raises(FileNotFoundError):
        item.read()
    with pytest.raises(
        SourceError, match=r"nothing: no such folder; bring it back with `dvc pull` if DVC keeps it, or set images\.source\.path"
    ):
        Folder(f"{s3}/nothing")
    with pytest.raises(ArtefactError, match="s3://no-such-bucket/x: there is no such bucket"):
        Folder("s3://no-such-bucket/x")


@pytest.mark.parametrize("path", ["tables", "tables/b/1.parquet"])
def test_parquet_files_give_the_same_rows_as_on_a_disk(
    s3: str, path: str, tmp_path: Path, png: Callable[[int], bytes], make: Callable[..., Any]
) -> None:
    images = [png(seed) for seed in range(20)]
    for name, part in (("b/1.parquet", images[12:]), ("a.parquet", images[:12])):
        (tmp_path / "tables" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": pa.array(part)}), tmp_path / "tables" / name, row_group_size=5)
    upload(tmp_path / "tables", f"{s3}/tables")
    there, here = (make({"kind": "parquet", "path": f"{at}/{path}"}, place, limit=7) for at, place in ((s3, "there"), (tmp_path, "here")))
    assert there.read("images").equals(here.read("images"))
    assert there.summary == here.summary


@pytest.mark.parametrize(
    ("path", "said"),
    [("none", "no such file or folder"), ("photos", "there are no files named"), ("x.parquet", "cannot be read as Parquet")],
)
def test_missing_parquet_files_are_named(s3: str, root: Path, path: str, said: str, make: Callable[..., Any]) -> None:
    (root / "x.txt").write_text("text")
    upload(root, f"{s3}/photos")
    (root.parent / "to-put").write_bytes(b"no Parquet at all")
    open_folder(s3).put(root.parent / "to-put", "x.parquet")
    with pytest.raises(SourceError, match=rf"{s3}/{path}: {said}"):
        make({"kind": "parquet", "path": f"{s3}/{path}"})


def test_references_to_objects_are_read_and_checked(s3: str, root: Path, make: Callable[..., Any]) -> None:
    upload(root, f"{s3}/photos")
    held, referring = (
        make({"kind": "folder", "path": f"{s3}/photos"}, f"{by}/images", by_reference=by == "there") for by in ("here", "there")
    )
    assert held.read("images").drop_columns(["encoded"]).equals(referring.read("images").drop_columns(["encoded"]))
    reader = OriginalReader(referring)
    contents = [OriginalReader(held).read(i) for i in range(held.summary["n_images"])]
    assert [reader.read(i) for i in range(len(contents))] == contents
    paths = held.read("images", ["path"])["path"].to_pylist()
    (root.parent / "other").write_bytes(contents[1])
    open_folder(f"{s3}/photos").put(root.parent / "other", paths[0])
    with pytest.raises(ArtefactError, match=rf"{s3}/photos/{paths[0]}: this image, .*, has changed; restore it, or run"):
        reader.read(0)
    open_folder(f"{s3}/photos").remove(paths[0])
    with pytest.raises(ArtefactError, match="is missing"):
        reader.read(0)


def test_archives_give_the_same_rows_as_on_a_disk(s3: str, tmp_path: Path, png: Callable[[int], bytes], make: Callable[..., Any]) -> None:
    (tmp_path / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "shards" / f"{shard}.tar", "w") as tar:
            for i in range(3):
                for name, content in ((f"{i}.png", png(3 * shard + i)), (f"{i}.cls", b"dog"), (f"{i}.txt", b"a dog")):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    upload(tmp_path / "shards", f"{s3}/shards")
    sources = ({"kind": "webdataset", "path": f"{at}/shards"} for at in (s3, tmp_path, s3))
    there, here, referring = (make(source, f"{n}/images", by_reference=n == 2) for n, source in enumerate(sources))
    assert there.read("images").equals(here.read("images")) and there.rows("images") == 6
    assert [OriginalReader(referring).read(i) for i in range(6)] == [OriginalReader(here).read(i) for i in range(6)]


def test_only_new_objects_are_read(s3: str, root: Path, png: Any, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    upload(root, f"{s3}/photos")
    source, read, whole = {"kind": "folder", "path": f"{s3}/photos"}, [], Remote._read
    make(source)
    monkeypatch.setattr(Remote, "_read", lambda self, name, *place: read.append(name) or whole(self, name, *place))
    make(source)
    assert read == ["captions.csv"]
    (root.parent / "new").write_bytes(png(77))
    open_folder(f"{s3}/photos").put(root.parent / "new", "new.png")
    make(source)
    assert read == ["captions.csv"] * 2 + ["new.png"]


DYING = """
import sys
from ommatid.config import ImagesParams
from ommatid.images import dataset
from ommatid.images.stage import run as make_images
from ommatid.store import open_draft

dataset.ROWS_PER_PART = 2
params = ImagesParams.model_validate_json(sys.argv[2])
with open_draft(sys.argv[1], "images", params.identity(), {}) as draft:
    write = draft.write_table
    def wait(name, *args, **options):
        if name == "images-00001.parquet":
            print("one part is there", flush=True)
            sys.stdin.readline()
        return write(name, *args, **options)
    draft.write_table = wait
    make_images(params, {}, draft)
"""


def test_a_killed_run_continues(s3: str, root: Path, params: Callable[..., Any], drafting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ommatid.images import dataset
    from ommatid.images.stage import run as make_images

    monkeypatch.chdir(root.parent)
    upload(root, f"{s3}/photos")
    values = params({"kind": "folder", "path": f"{s3}/photos"})
    command = [sys.executable, "-c", DYING, f"{s3}/data/images", values.model_dump_json()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"one part is there\n"
        process.send_signal(signal.SIGKILL)
    monkeypatch.setattr(dataset, "ROWS_PER_PART", 2)
    with drafting(f"{s3}/data/images", values) as draft:
        assert draft.names() == ["images-00000.parquet"]
        first = draft.describe("images-00000.parquet")
        made = make_images(values, {}, draft)
        assert made.manifest.files[0] == first
        continued = draft.publish(f"{s3}/data/images")
    with drafting(f"{s3}/data/again", values) as draft:
        make_images(values, {}, draft)
        assert draft.publish(f"{s3}/data/again").digest == continued.digest
    continued.verify()
