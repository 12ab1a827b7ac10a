"""One image is read from the data set as it was in the source, by a few small requests, wherever it lies; and damage is an error."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ommatid.errors import ArtefactError
from ommatid.images.dataset import PARQUET
from ommatid.images.original import AHEAD, OriginalReader, read_struct
from ommatid.schemas import IMAGES
from ommatid.store import Artefact, open_draft, part_name
from ommatid.store.filesystem.disk import Disk


def write(place: Path | str, sizes: list[int], n_parts: int = 1, **changes: object) -> tuple[Artefact, list[bytes]]:
    """Write a data set of random files of these sizes, as the stage does."""
    files = [hashlib.shake_128(str(i).encode()).digest(size) for i, size in enumerate(sizes)]
    rows = [
        {
            "image": i, "image_id": hashlib.sha256(file).hexdigest(), "path": f"{i}", "split": "eval", "width": 9, "height": 9,
            "label": None, "captions": [], "taxonomy": None, "thumbnail": b"small", "encoded": file,
        }
        for i, file in enumerate(files)
    ]  # fmt: skip
    each = -(-len(rows) // n_parts)
    with open_draft(place, "images", {}, {}) as draft:
        for index in range(n_parts):
            table = pa.Table.from_pylist(rows[index * each : (index + 1) * each], schema=IMAGES)
            draft.write_table(part_name("images", index), table, **{**PARQUET, **changes})
        draft.seal({})
        return draft.publish(place), files


def test_each_image_is_as_it_was(tmp_path: Path) -> None:
    # pages of sixteen, groups of 128, parts, files longer than a request, and empty ones
    sizes = [(i - 1) * 7919 % 3000 if i % 50 else 3 * AHEAD + i for i in range(700)]
    artefact, files = write(tmp_path / "images", sizes, n_parts=2)
    assert 0 in sizes and len(artefact.parts("images")) == 2
    reader = OriginalReader(artefact)
    assert [reader.read(i) for i in range(700)] == files


def test_from_an_object_store(s3: str) -> None:
    artefact, files = write(f"{s3}/images", [1000, 200_000, 3000], n_parts=3)
    reader = OriginalReader(artefact)
    assert [reader.read(i) for i in range(3)] == files


def test_images_around_it_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact, files = write(tmp_path / "images", [2_000_000] * 20)
    reader, read = OriginalReader(artefact), []
    whole = Disk.read_range
    monkeypatch.setattr(Disk, "read_range", lambda self, name, start, end: read.append(end - start) or whole(self, name, start, end))
    assert reader.read(19) == files[19]
    assert len(read) <= 8 and sum(read) < 2_000_000 + 8 * AHEAD, "of 40 MB"


@pytest.mark.parametrize("image", [-1, 3, 2**31])
def test_no_such_image(image: int, tmp_path: Path) -> None:
    artefact, _ = write(tmp_path / "images", [5, 6, 7])
    with pytest.raises(ArtefactError, match=f"there is no image {image}; it has 3"):
        OriginalReader(artefact).read(image)


def test_a_part_of_another_kind(tmp_path: Path) -> None:
    artefact, _ = write(tmp_path / "images", [5], compression="zstd")
    with pytest.raises(ArtefactError, match=r"images-00000.parquet was not written by the stage images"):
        OriginalReader(artefact).read(0)


def test_a_damaged_part(tmp_path: Path) -> None:
    artefact, _ = write(tmp_path / "images", [50, 50])
    reader = OriginalReader(artefact)
    reader.read(0)
    part = tmp_path / "images" / "images-00000.parquet"
    start = pq.read_metadata(part).row_group(0).column(IMAGES.names.index("encoded")).data_page_offset
    content = bytearray(part.read_bytes())
    content[start : start + 8] = b"\x19" * 8
    part.chmod(0o644)
    part.write_bytes(content)
    with pytest.raises(ArtefactError, match="header with a field of type 9"):
        reader.read(0)
    part.unlink()
    with pytest.raises(ArtefactError, match=r"image 0 cannot be read .*; run the stage images again"):
        reader.read(0)


def test_thrift_structs() -> None:
    # field 1: 150 as zigzag; 2: true; 20, by its long form: a struct of field 5: -1; the end of both; one byte more
    data = bytes([0x15, 0xAC, 0x02, 0x11, 0x0C, 40, 0x55, 0x01, 0, 0, 99])
    assert read_struct(data) == ({1: 150, 2: 1, 20: {5: -1}}, 10)
