"""A data set that refers to its files has the same images as one that holds them, and says so if a file is no longer what it was.

Whoever reads the column `encoded` gets the same bytes: extraction, drawn images, evidence for labels, and originals.
"""

import json
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ommatid.config import ExtractParams, load_params
from ommatid.errors import ArtefactError, ConfigError
from ommatid.explorer.originals import Originals
from ommatid.extract import networks
from ommatid.extract.drawn import DrawnImages, iter_drawn_pixels
from ommatid.extract.stage import extract
from ommatid.images import loader
from ommatid.images.eval_split import load_eval_split
from ommatid.images.original import OriginalReader
from ommatid.images.reference import Reference, load_file, parse_reference
from ommatid.label.evidence import Spool
from ommatid.store import Artefact, open_draft
from ommatid.store.filesystem import Disk, disk, listing
from support.study import CHECKOUT, make_test_params
from support.tiles import TileModel, write_tile_folder

Make = Callable[..., Artefact]


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    write_tile_folder(tmp_path / "tiles", 40)
    (tmp_path / "tiles" / "text.png").write_bytes(b"text")
    return tmp_path / "tiles"


@pytest.fixture
def both(tiles: Path, make: Make) -> tuple[Artefact, Artefact]:
    """The same images by value and by reference."""
    source = {"kind": "folder", "path": str(tiles)}
    return make(source, "held/images"), make(source, "referring/images", by_reference=True)


def test_all_columns_but_the_content_are_the_same(both: tuple[Artefact, Artefact], tiles: Path) -> None:
    held, referring = (artefact.read("images") for artefact in both)
    assert held.drop_columns(["encoded"]).equals(referring.drop_columns(["encoded"]))
    assert both[0].read("rejected").equals(both[1].read("rejected"))
    assert both[0].summary == both[1].summary
    for row, value in zip(held.to_pylist(), referring["encoded"].to_pylist(), strict=True):
        found = {"place": str(tiles), "name": row["path"], "size": len(row["encoded"]), "offset": None, "sha256": row["image_id"]}
        assert json.loads(value) == found
        assert load_file(value) == load_file(row["encoded"]) == row["encoded"]


def test_extraction_gives_the_same_bytes(both: tuple[Artefact, Artefact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TileModel()
    monkeypatch.setattr(networks, "load_model", lambda params, dtype, device: model)
    monkeypatch.setattr(networks, "load_judge", lambda params, dtype, device: model)
    values = make_test_params().model_dump(mode="json")["extract"]
    params = ExtractParams.model_validate(values | {"hookpoints": ["tiles"], "tokens": "patch", "batch_size": 7, "dtype": "float32"})

    def run(images: Artefact, place: Path) -> dict[str, str]:
        with open_draft(place, "extraction", params.identity(), {"images": images}) as draft:
            extract(params, {"images": images}, draft)
            artefact = draft.publish(place).child("tiles", "activations")
        return {file.name: file.sha256 for file in artefact.manifest.files}

    held, referring = both
    assert run(held, tmp_path / "a") == run(referring, tmp_path / "b")
    next((tmp_path / "tiles" / "red").iterdir()).write_bytes(b"other")
    with pytest.raises(
        ArtefactError, match=r"tiles/red/\d+\.png: this image, to which the data set refers .*, has changed; restore it, or run"
    ):
        run(referring, tmp_path / "c")


def test_drawn_images_evidence_and_originals_are_the_same(both: tuple[Artefact, Artefact], tmp_path: Path) -> None:
    drawn = DrawnImages(np.arange(0, 40, 3), np.arange(0, 40, 3))
    held, referring = ([p.of[0].numpy() for p in iter_drawn_pixels(images, drawn, TileModel.preprocess, "cpu")] for images in both)
    assert all(np.array_equal(*pair) for pair in zip(held, referring, strict=True))
    spools = []
    for images in both:
        split = load_eval_split(images)
        with open_draft(tmp_path / f"labels{len(spools)}", "labels", {}, {}) as draft:
            spool = Spool(images, split, draft, TileModel.preprocess)
            spools.append([spool.read(row) for row in range(len(split.images))])
    assert spools[0] == spools[1] and len(spools[0]) > 5
    originals = [[OriginalReader(images).read(i) for i in range(40)] for images in both]
    assert originals[0] == originals[1]


def test_files_are_read_ahead_of_decoding_and_many_at_a_time(both: tuple[Artefact, Artefact], monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [
        loader.Encoded(np.arange(4), np.ones(4, dtype=bool), batch["encoded"].to_pylist())
        for batch in both[1].iter_batches("images", ["encoded"], n_rows=4)
    ]
    events: list[str] = []
    read = Disk.read_bytes
    monkeypatch.setattr(Disk, "read_bytes", lambda self, name: events.append("read") or read(self, name))
    iterator = loader._load_ahead(iter(batches))
    first = next(iterator)
    assert all(parse_reference(file) is None for file in first.files)
    assert 4 <= len(events) <= 8, "this batch and the next"
    assert len(list(iterator)) == len(batches) - 1 and len(events) == 40


def test_a_change_of_one_file_is_named_and_said_what_to_do(both: tuple[Artefact, Artefact], tiles: Path) -> None:
    _, referring = both
    reader, paths = OriginalReader(referring), referring.read("images", ["path"])["path"].to_pylist()
    content = (tiles / paths[3]).read_bytes()
    (tiles / paths[3]).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (tiles / paths[4]).unlink()
    for image, what in ((3, "has changed"), (4, "is missing")):
        with pytest.raises(ArtefactError) as raised:
            reader.read(image)
        assert str(raised.value) == (
            f"{tiles / paths[image]}: this image, to which the data set refers (images.by_reference), {what}; "
            "restore it, or run `ommatid images` again"
        )
    (tiles / paths[3]).write_bytes(content)
    assert reader.read(3) == content


def test_a_change_that_no_time_shows_is_mended_by_another_run(
    tiles: Path, make: Make, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_stamp_of", lambda status: f"{status.st_mtime_ns}")
    source = {"kind": "folder", "path": str(tiles)}
    paths = make(source, by_reference=True).read("images", ["path"])["path"].to_pylist()
    status, content = (tiles / paths[3]).stat(), (tiles / paths[3]).read_bytes()
    (tiles / paths[3]).write_bytes(changed := content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(tiles / paths[3], ns=(status.st_atime_ns, status.st_mtime_ns))
    reads.clear()
    with pytest.raises(ArtefactError, match="has changed"):
        OriginalReader(make(source, by_reference=True)).read(3)
    reads.clear()
    assert OriginalReader(make(source, by_reference=True)).read(3) == changed
    assert reads == [paths[3]] * 2, "once by the run, and once by the reader"


def test_a_page_says_why_an_original_is_missing(both: tuple[Artefact, Artefact], tiles: Path, tmp_path: Path) -> None:
    (row,) = both[1].read("images", ["path", "image_id"]).slice(5, 1).to_pylist()
    pages = Originals(str(tmp_path / "referring"))
    assert pages.get(5, row["image_id"][:12]) == ((tiles / row["path"]).read_bytes(), "image/png")
    (tiles / row["path"]).unlink()
    with pytest.raises(ArtefactError, match="is missing; restore it"):
        Originals(str(tmp_path / "referring")).get(5, row["image_id"][:12])


def test_relative_paths_are_found_in_the_checkout_of_the_run(
    tiles: Path, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = make({"kind": "folder", "path": "tiles"}, "data/images", by_reference=True)
    value = images.read("images", ["encoded"])["encoded"][0].as_py()
    reference = parse_reference(value)
    assert reference and reference.place == "tiles"
    content = (tiles / reference.name).read_bytes()
    assert load_file(value) == content
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ArtefactError, match=r"^tiles/.* is missing"):
        load_file(value)
    assert OriginalReader(Artefact(Disk(tmp_path / "data/images"), images.manifest, images.digest)).read(0) == content, "beside its study"
    monkeypatch.setenv("OMMATID_CHECKOUT", str(tmp_path))  # as flows set it in the worktree of an experiment
    assert load_file(value) == content


@pytest.mark.parametrize("source", [{"kind": "webdataset", "path": "tiles.tar"}, {"kind": "folder", "path": "tiles"}])
def test_what_exists_everywhere_is_found_where_the_file_is(
    source: dict[str, str], tiles: Path, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with tarfile.open("tiles.tar", "w") as tar:
        tar.add("tiles")
    images = make(source, "data/images", by_reference=True)
    content = OriginalReader(images).read(0)
    (tmp_path / "elsewhere/tiles").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert OriginalReader(Artefact(Disk(tmp_path / "data/images"), images.manifest, images.digest)).read(0) == content


def test_a_name_that_is_not_unicode_is_found_again(tiles: Path, make: Make) -> None:
    os.rename(os.fsencode(next((tiles / "blue").iterdir())), os.fsencode(tiles) + b"/\xff.png")
    images = make({"kind": "folder", "path": str(tiles)}, by_reference=True)
    paths = images.read("images", ["path"])["path"].to_pylist()
    assert len(OriginalReader(images).read(paths.index("\\xff.png"))) > 100


@pytest.fixture
def reads(tiles: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(listing, "SETTLED_NS", -(10**9))
    names: list[str] = []
    read = Disk.read_bytes
    monkeypatch.setattr(Disk, "read_bytes", lambda self, name: (self.path == tiles and names.append(name)) or read(self, name))
    return names


def test_only_new_files_are_read(tiles: Path, make: Make, reads: list[str]) -> None:
    source: dict[str, Any] = {"kind": "folder", "path": str(tiles)}
    make(source, by_reference=True)
    assert len(reads) == 41
    reads.clear()
    (tiles / "red" / "new.png").write_bytes((tiles / "red" / "0000.png").read_bytes() + b"\0")
    paths = make(source, by_reference=True).read("images", ["path"])["path"].to_pylist()
    assert reads == ["red/new.png"]
    reads.clear()
    held = make(source)
    assert sorted(reads) == sorted(held.read("images", ["path"])["path"].to_pylist()) == sorted(paths), "each is copied once"


def test_a_source_without_files_is_refused() -> None:
    with pytest.raises(ConfigError) as raised:
        load_params(CHECKOUT / "params.yaml", ["images.by_reference=true"])
    assert "images: by_reference is true, but a source of kind cifar10 has no image files to refer to" in str(raised.value)
    assert "set by_reference to false, or source.kind to folder" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x89PNG", b'{"name": 1}'])
def test_content_is_never_taken_for_a_reference(content: bytes) -> None:
    assert parse_reference(content) is None and load_file(content) == content


def test_a_reference_survives_being_written() -> None:
    references: Sequence[Reference] = [Reference("a", "b\udcff.png", 3, None, "00"), Reference("s3://x/y", "z.tar", 4, 512, "11")]
    assert [parse_reference(one.dump()) for one in references] == references
