"""Proves that one changed byte, anywhere in an artefact or in the files of an unfinished run, never leads to other results."""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ommatid.activations.batches import iter_batches, load_sample
from ommatid.errors import ArtefactError
from ommatid.extract.receipts import iter_missing
from ommatid.extract.rows import Spill
from ommatid.label.labellers.base import Answer
from ommatid.label.labellers.vlm.client import AnswerCache
from ommatid.label.labellers.vlm.messages import Completion
from ommatid.label.table import AnswerLog
from ommatid.store import Artefact, Draft, File, damage, open_artefact, open_draft, part_name
from ommatid.store.sums import BLOCK
from support.activations import make_activations

ROWS = 30_000


@contextmanager
def flipped(path: Path, at: int, bit: int) -> Iterator[None]:
    """Flip one bit of a file until the block ends."""
    content = path.read_bytes()
    path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
    yield
    path.write_bytes(content)


def places(path: Path, n: int) -> list[tuple[int, int]]:
    """Choose some bytes and bits of a file, always the same ones, including the first and the last."""
    draw, size = random.Random(path.name), path.stat().st_size
    return [(at % size, 1 << draw.randrange(8)) for at in (0, -1, -6, -200, *(draw.randrange(size) for _ in range(n)))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact with two tables of several row groups and a file that is not a table."""
    folder = tmp_path_factory.mktemp("damage") / "images"
    random_bytes = np.random.default_rng(0).bytes
    with open_draft(folder, "images", {"limit": 3}, {}) as draft:
        for i in range(2):
            table = pa.table({"image": np.arange(ROWS), "encoded": pa.array([random_bytes(48) for _ in range(ROWS)], pa.binary(48))})
            draft.write_table(part_name("images", i), table, row_group_size=ROWS // 3, compression="none", use_dictionary=False)
        with draft.write_file("cfg.json") as path:
            path.write_text(json.dumps({"k": 3}))
        draft.seal({"n_images": 2 * ROWS})
        draft.publish(folder)
    return folder


def test_every_byte_of_a_manifest_counts(place: Path) -> None:
    path = place / "manifest.json"
    draw = random.Random(0)
    for at in range(path.stat().st_size):
        with flipped(path, at, 1 << draw.randrange(8)), pytest.raises(ArtefactError, match=str(place)):
            open_artefact(place, "images")


def by_row_groups(images: Artefact) -> Any:
    with images.open_part("images-00001.parquet") as file:
        return [file.read_row_group(i) for i in range(file.num_row_groups)]


READERS: dict[str, Callable[[Artefact], Any]] = {
    "read": lambda images: images.read("images"),
    "batches": lambda images: list(images.iter_batches("images")),
    "part": lambda images: images.read_part("images-00001.parquet", ["encoded"]),
    "row groups": by_row_groups,
    "file": lambda images: images.file("cfg.json").read_text(),
    "files": lambda images: [path.read_bytes() for path in images.files("images")],
    "folder": lambda images: [path.read_bytes() for path in sorted(images.path.iterdir())],
}


@pytest.mark.parametrize("reader", READERS)
def test_every_way_of_reading_notices_a_flipped_bit_or_is_unaffected(place: Path, reader: str) -> None:
    read = READERS[reader]
    right, n_found = read(open_artefact(place, "images")), 0
    for path in sorted(place.iterdir()):
        for at, bit in places(path, 6):
            with flipped(path, at, bit):
                try:
                    assert read(open_artefact(place, "images")) == right, (path.name, at)
                except ArtefactError as error:
                    assert path.name in str(error)
                    n_found += 1
    assert n_found >= 20 and read(open_artefact(place, "images")) == right


def test_memory_mapped_training_batches_are_checked(tmp_path: Path) -> None:
    activations = make_activations(tmp_path)

    def read() -> list[bytes]:
        found = open_artefact(activations.url, "activations")
        return [batch.x.numpy().tobytes() for batch in islice(iter_batches(found, 500, 0), 8)] + [load_sample(found, 99).numpy().tobytes()]

    right, n_found = read(), 0
    for path in sorted(tmp_path.glob("activations/*.parquet")):
        for at, bit in places(path, 12):
            with flipped(path, at, bit):
                try:
                    assert read() == right, (path.name, at)
                except ArtefactError as error:
                    assert f"{path.name}: checksum differs" in str(error)
                    n_found += 1
    assert n_found > 20 and read() == right


def test_only_columns_that_are_read_are_checked_and_each_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a large data set most bytes belong to other columns, and every epoch reads the same ones."""
    images = open_artefact(place, "images")
    (last := place / part_name("images", 1)).touch()  # as if new: nothing of it was checked
    sums_of, n_bytes = damage.sums_of, [0]

    def counting(data: bytes) -> str:
        n_bytes[0] += len(data)
        return sums_of(data)

    monkeypatch.setattr(damage, "sums_of", counting)
    metadata = images.read_part(last.name, ["image"])
    assert 0 < n_bytes[0] < last.stat().st_size, "less than all of it"
    for_one, n_bytes[0] = n_bytes[0], 0
    assert images.read_part(last.name, ["image"]) == metadata and n_bytes[0] == 0
    images.files("images", {"image"})
    assert n_bytes[0] == 0
    images.file(last.name)
    assert n_bytes[0] + for_one >= last.stat().st_size - BLOCK and for_one >= BLOCK


def test_a_damaged_part_of_a_draft_is_made_again(tmp_path: Path) -> None:
    said: list[str] = []
    for name in (part_name("images", 0), "scratch/checkpoint.json", "receipts/probe.json"):
        with open_draft(tmp_path / "images", "images", {}, {}) as draft:
            if name.endswith("parquet"):
                draft.write_table(name, pa.table({"x": [1, 2]}))
            else:
                draft.write_json(name, [1, 2])
        content, path = (draft.path / name).read_bytes(), draft.path / name
        for at, bit in places(path, 4):
            path.write_bytes(content)
            with open_draft(tmp_path / "images", "images", {}, {}) as draft:
                assert draft.has(name)
            path.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :] if at else b"cut")
            with open_draft(tmp_path / "images", "images", {}, {}, said.append) as draft:
                assert not draft.has(name) and not path.exists()
            assert said[-1] == f"{path}: damaged since an interrupted run wrote it; it is made again"


def test_a_damaged_file_of_a_draft_does_not_get_a_new_checksum(tmp_path: Path) -> None:
    with open_draft(tmp_path / "images", "images", {}, {}) as draft:
        draft.write_table("rejected.parquet", pa.table({"x": [1, 2]}))
    (draft.path / "rejected.parquet").write_bytes(b"something else")
    said = r"rejected.parquet: checksum differs"
    with open_draft(tmp_path / "images", "images", {}, {}) as draft, pytest.raises(ArtefactError, match=said):
        draft.seal({})


def test_a_damaged_sealed_draft_is_made_again(tmp_path: Path) -> None:
    place = tmp_path / "activations"

    def make() -> tuple[list[str], bytes]:
        made = []
        with open_draft(place, "extraction", {}, {}) as draft:
            if (whole := draft.sealed()) is None:
                child = draft.child("one", "activations")
                if not child.sealed():
                    made.append("one")
                    child.write_table("train-00000.parquet", pa.table({"x": [1, 2]}))
                    child.seal({})
                made.append("all")
                draft.write_table("plan.parquet", pa.table({"shard": [0]}))
                whole = draft.seal({})
            return made, json.dumps([whole.digest]).encode()

    first = make()
    assert first[0] == ["one", "all"] and make() == ([], first[1])
    (folder,) = (tmp_path / ".work").glob("activations-*")
    for name in ("one/train-00000.parquet", "one/manifest.json", "plan.parquet", "manifest.json"):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 4
        (folder / name).write_bytes(content)
        assert make() == first, name


def test_shards_with_a_damaged_receipt_or_file_are_made_again(tmp_path: Path) -> None:
    with open_draft(tmp_path / "activations", "extraction", {}, {}) as draft:
        worker = Draft.attach(draft.url)
        for shard in range(5):
            files: dict[str, File] = {}
            for table in ("train", "eval", "embeddings"):
                name = part_name(table, shard)
                files[table] = worker.write_table(f"one/{name}", pa.table({"x": [shard]}))
            plain = {
                table: {name: getattr(file, name) for name in File.__slots__} | {"name": file.name[4:]} for table, file in files.items()
            }
            receipt = {"hookpoints": {"one": {"files": [plain["train"], plain["eval"]]}}, "embeddings": {"files": [plain["embeddings"]]}}
            worker.write_json(f"receipts/{shard:07d}.json", receipt)
        assert list(iter_missing(draft, ["one"], 5)) == []
        for name in ("one/train-00001.parquet", "one/embeddings-00002.parquet", "receipts/0000003.json"):
            content = bytearray((draft.path / name).read_bytes())
            content[len(content) // 2] ^= 2
            (draft.path / name).write_bytes(content)
        (draft.path / "one/eval-00004.parquet").unlink()
        assert list(iter_missing(draft, ["one"], 5)) == [1, 2, 3, 4]


def test_spilled_chunks_are_checked_when_a_run_continues(tmp_path: Path) -> None:
    batch = pa.RecordBatch.from_pydict({"x": list(range(100))})
    for name in ("a.arrow", "checksums.json"):
        spill = Spill(tmp_path / name)
        for chunk in range(2):
            spill.write(chunk, {"a": [batch]})
        path = tmp_path / name / "00000" / name
        content = path.read_bytes()
        path.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])
        again = Spill(tmp_path / name)
        assert [again.has(0), again.has(1)] == [False, True]
        again.write(0, {"a": [batch]})
        assert again.read(0, "a") == batch


def test_damaged_answers_are_asked_for_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with closing(AnswerLog(path)) as kept:
        for latent in range(3):
            kept.add(latent, Answer("ok", f"label {latent}"))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"label 1", b"label 7"))
    with closing(AnswerLog(path)) as kept:
        assert list(kept.answers) == [0]
    cache = AnswerCache(tmp_path / "answers.sqlite")
    cache.add("key", "model", Completion("a red bird", None, "stop", 4))
    stored = (tmp_path / "answers.sqlite").read_bytes()
    (tmp_path / "answers.sqlite").write_bytes(stored.replace(b"red bird", b"bed bird"))
    assert cache.get("key") is None
    cache.add("key", "model", said := Completion("a red bird", None, "stop", 4))
    assert cache.get("key") == said
