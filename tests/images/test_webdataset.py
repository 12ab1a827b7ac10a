"""Tar archives in the layout of WebDataset give the images, labels and captions of their samples, by value and by reference.

What is broken, or not used, is named and counted, and the rest is kept. Oracle: the same images in a folder.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ommatid.config import WebDatasetSource, load_params
from ommatid.errors import ArtefactError, SourceError
from ommatid.events import Warned
from ommatid.images import webdataset
from ommatid.images.original import OriginalReader
from ommatid.images.stage import run as make_images
from ommatid.images.webdataset import WebDataset, open_source
from ommatid.sources.stage import write_sources
from ommatid.store import Artefact
from ommatid.store.filesystem import Disk, listing
from support.study import CHECKOUT

Make = Callable[..., Artefact]
Png = Callable[[int], bytes]


def write(path: Path, members: Mapping[str, bytes | str], **options: Any) -> Path:
    """Write an archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def source(path: Path | str) -> dict[str, Any]:
    return {"kind": "webdataset", "path": str(path)}


@pytest.fixture
def shards(tmp_path: Path, png: Png) -> Path:
    """Two archives of five images; the second holds a duplicate of the first image, and a file that is none."""
    root = tmp_path / "shards"
    write(root / "a-000.tar", {"1.png": png(1), "1.cls": "dog\n", "1.txt": "a dog", "2.png": png(2), "2.json": json.dumps({"label": 7})})
    write(root / "a-001.tar", {"x/3.png": png(3), "x/4.png": png(1), "x/5.jpg": b"text", "x/6.png": png(6)})
    return root


def test_images_labels_and_captions_are_those_of_the_samples(shards: Path, make: Make, png: Png) -> None:
    artefact = make(source(shards))
    rows = artefact.read("images").to_pylist()
    assert [(row["path"], row["label"], row["captions"]) for row in rows] == [
        ("a-000.tar/1.png", "dog", ["a dog"]),
        ("a-000.tar/2.png", "7", []),
        ("a-001.tar/x/3.png", None, []),
        ("a-001.tar/x/6.png", None, []),
    ]
    assert [row["encoded"] for row in rows] == [png(1), png(2), png(3), png(6)]
    assert [(row["path"], row["reason"]) for row in artefact.read("rejected").to_pylist()] == [
        ("a-001.tar/x/4.png", "duplicate"),
        ("a-001.tar/x/5.jpg", "not_an_image"),
    ]


def test_by_reference_everything_but_the_content_is_the_same(shards: Path, make: Make) -> None:
    held, referring = make(source(shards), "held"), make(source(shards), "referring", by_reference=True)
    assert held.read("images").drop_columns(["encoded"]).equals(referring.read("images").drop_columns(["encoded"]))
    assert [OriginalReader(referring).read(i) for i in range(4)] == [OriginalReader(held).read(i) for i in range(4)]
    size = (shards / "a-000.tar").stat().st_size
    with (shards / "a-000.tar").open("r+b") as file:
        file.seek(600)
        file.write(b"!!!")
    with pytest.raises(ArtefactError, match=rf"{shards}/a-000\.tar, bytes 512 to \d+: this image, .* has changed; restore it, or run"):
        OriginalReader(referring).read(0)
    (shards / "a-000.tar").unlink()
    assert size
    with pytest.raises(ArtefactError, match=r"a-000\.tar, bytes 512 to \d+: this image, .* is missing"):
        OriginalReader(referring).read(0)


def test_one_archive_is_a_source_too(shards: Path, make: Make) -> None:
    assert make(source(shards / "a-000.tar"), by_reference=True).read("images", ["path"])["path"].to_pylist() == [
        "a-000.tar/1.png",
        "a-000.tar/2.png",
    ]


@pytest.mark.parametrize("by_reference", [False, True])
def test_only_a_new_archive_is_indexed_read_and_decoded(
    by_reference: bool, shards: Path, make: Make, png: Png, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checksums: Callable[..., Any]
) -> None:
    monkeypatch.setattr(listing, "SETTLED_NS", -(10**9))
    make(source(shards), by_reference=by_reference)
    indexed, read = [], []
    index, read_range = webdataset.index, Disk.read_range
    monkeypatch.setattr(webdataset, "index", lambda file: indexed.append(file.name) or index(file))
    spy = lambda self, name, *place: (name.endswith(".tar") and read.append(name)) or read_range(self, name, *place)  # noqa: E731
    monkeypatch.setattr(Disk, "read_range", spy)
    make(source(shards), by_reference=by_reference)
    assert (indexed, read) == ([], [])
    write(shards / "a-0005.tar", {"9.png": png(9)})
    make(source(shards), by_reference=by_reference)
    assert (indexed, read) == (["a-0005.tar"], ["a-0005.tar"])
    monkeypatch.setenv("OMMATID_CACHE", str(tmp_path / "another cache"))
    make(source(shards), "scratch", by_reference=by_reference)
    assert checksums(tmp_path / "artefact") == checksums(tmp_path / "scratch")


def test_what_is_not_used_is_named_and_counted(tmp_path: Path, png: Png, params: Callable[..., Any], drafting: Any) -> None:
    root = tmp_path / "shards"
    write(root / "a.tar", {"1.seg.png": png(1), "1.png": png(2), "1.cls": b"\xff", "2.txt": "alone", "3.json": "{}", "4.JPG": png(4)})
    write(root / "b.tar", {"5.png": png(5), "5.json": "[1]", "6.png": png(6), "6.txt": "  "})
    (root / "c.tar.gz").write_bytes(b"")
    values, events = params(source(root)), []
    with drafting(tmp_path / "images", values) as draft:
        artefact = make_images(values, {}, draft, events.append)
    assert [event.what for event in events if isinstance(event, Warned)] == [
        f"{root}: 1 file is not read, because its name does not end in .tar: c.tar.gz",
        f"{root}: 2 samples are left out, having no image: a.tar/2, a.tar/3",
        f"{root}: 1 sample is used with one of several images: a.tar/1",
        f"{root}: 3 texts are not used, being empty, too long or not what their ending says: a.tar/1.cls, b.tar/5.json, b.tar/6.txt",
    ]
    assert artefact.read("images", ["path"])["path"].to_pylist() == ["a.tar/1.png", "a.tar/4.JPG", "b.tar/5.png", "b.tar/6.png"]


def test_of_members_with_one_name_the_last_is_used_as_when_unpacked(
    tmp_path: Path, png: Png, params: Callable[..., Any], drafting: Any
) -> None:
    path = write(tmp_path / "a.tar", {"1.png": png(1), "1.cls": "cat", "2.png": png(2)})
    with tarfile.open(path, "a") as tar:  # as `tar --append` replaces a sample
        for name, content in (("1.png", png(3)), ("1.cls", b"dog")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    values, events = params(source(path)), []
    with drafting(tmp_path / "images", values) as draft:
        rows = make_images(values, {}, draft, events.append).read("images").to_pylist()
    found = {row["path"]: (row["label"], row["encoded"]) for row in rows}
    assert found == {"a.tar/1.png": ("dog", png(3)), "a.tar/2.png": (None, png(2))}
    assert [event.what for event in events if isinstance(event, Warned)] == [
        f"{path}: 2 members are there more than once, of which the last is used, as when unpacked: a.tar/1.png, a.tar/1.cls"
    ]


def test_json_gives_label_captions_and_taxonomy_beside_other_members(tmp_path: Path, png: Png, make: Make) -> None:
    values = {"label": "cat", "captions": ["one", "two", 3], "taxonomy": "animal/cat", "url": "http://x"}
    members = {
        "1.json": json.dumps(values),
        "1.cls": "tabby",
        "1.txt": "two",
        "1.png": png(1),
        "2.png": png(2),
        "2.json": '{"caption": "c"}',
    }
    first, second = make(source(write(tmp_path / "a.tar", members))).read("images").to_pylist()
    assert (first["label"], first["captions"], first["taxonomy"]) == ("tabby", ["one", "two"], "animal/cat")
    assert (second["label"], second["captions"], second["taxonomy"]) == (None, ["c"], None)


@pytest.mark.parametrize("damage", ["cut in a file", "cut in a header", "overwritten"])
def test_of_a_broken_archive_the_samples_before_the_damage_are_kept(damage: str, shards: Path, make: Make) -> None:
    path = shards / "a-001.tar"
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        member = tar.getmember("x/6.png")
    cut = {"cut in a file": data[: member.offset_data + 9], "cut in a header": data[: member.offset + 99]}
    path.write_bytes(cut.get(damage, data[: member.offset] + b"!" * 512 + data[member.offset + 512 :]))
    artefact = make(source(shards))
    assert artefact.read("images", ["path"])["path"].to_pylist() == ["a-000.tar/1.png", "a-000.tar/2.png", "a-001.tar/x/3.png"]
    last = artefact.read("rejected").to_pylist()[-1]
    assert (last["path"], last["reason"]) == ("a-001.tar", "truncated")
    assert re.fullmatch(r"the archive is broken after [34] members \(.+\)", last["detail"])


@pytest.mark.parametrize("content", [b"", b"no archive at all" * 100])
def test_an_archive_that_is_none_is_named_and_the_others_are_read(content: bytes, shards: Path, make: Make) -> None:
    (shards / "b.tar").write_bytes(content)
    artefact = make(source(shards))
    assert artefact.summary["n_images"] == 4
    assert artefact.read("rejected").to_pylist()[-1]["path"] == "b.tar"
    with pytest.raises(SourceError, match=r"b\.tar: there are no images in 1 archives; 1 archive is broken: .*b\.tar; change images"):
        make(source(shards / "b.tar"))


@pytest.mark.parametrize(
    ("members", "said"),
    [({"1.txt": "x"}, "there are no images in 1 archives; images end in jpg, jpeg, png"), (None, "there are no files named *.tar")],
)
def test_a_source_without_images_is_refused(members: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    if members:
        write(tmp_path / "shards" / "a.tar", members)
    with pytest.raises(SourceError, match=re.escape(said)):
        WebDataset(str(tmp_path / "shards"))


def test_links_folders_and_long_names_do_no_harm(tmp_path: Path, png: Png, make: Make) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("1.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("d/" + "long" * 60 + ".png")
        info.size = len(png(1))
        tar.addfile(info, io.BytesIO(png(1)))
    assert make(source(path)).read("images", ["path"])["path"].to_pylist() == ["a.tar/d/" + "long" * 60 + ".png"]


def test_the_fingerprint_follows_the_archives(shards: Path, tmp_path: Path, png: Png) -> None:
    def fingerprint() -> Any:
        params = load_params(CHECKOUT / "params.yaml", [f"images.source={{kind: webdataset, path: {shards}}}"])
        return write_sources(params, tmp_path / "sources")["images"]["images.source.path"]

    before = fingerprint()
    assert before["n_files"] == 2 and fingerprint() == before
    write(shards / "a-001.tar", {"7.png": png(7)})
    assert fingerprint() != before


def test_a_single_archive_that_keeps_size_and_time_is_indexed_anew_after_a_change(shards: Path) -> None:
    archive = sorted(shards.glob("*.tar"))[0]
    before, status = open_source(WebDatasetSource(kind="webdataset", path=str(archive))).fingerprint, archive.stat()
    archive.write_bytes(archive.read_bytes())
    os.utime(archive, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert open_source(WebDatasetSource(kind="webdataset", path=str(archive))).fingerprint != before


def test_items_at_positions_are_those_of_the_whole(shards: Path) -> None:
    opened = open_source(WebDatasetSource(kind="webdataset", path=str(shards)))
    whole = [item.path for item in opened.iter_items(range(opened.total))]
    assert [item.path for item in opened.iter_items([0, 3, 5])] == [whole[0], whole[3], whole[5]]
