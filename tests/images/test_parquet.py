"""Parquet files become rows: binary columns and Hugging Face's structs, labels, skipped row groups, and errors that name columns."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ommatid.config import ParquetSource
from ommatid.errors import SourceError
from ommatid.images.parquet import ParquetFiles


def source(path: Path, **changes: str) -> ParquetSource:
    return ParquetSource.model_validate({"kind": "parquet", "path": str(path), **changes})


def write(path: Path, columns: dict[str, pa.Array], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.mark.parametrize(
    "type_",
    [pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.binary()), pa.struct([("bytes", pa.binary()), ("path", pa.string())])],
    ids=str,
)
def test_binary_and_struct_columns_are_read(type_, tmp_path, png, make):
    images = [png(0), png(1), None]
    if pa.types.is_struct(type_):
        images = [{"bytes": image, "path": "somewhere.png"} for image in images]
    path = write(tmp_path / "x.parquet", {"image": pa.array(images, type_)})
    artefact = make(source(path).model_dump())
    rows = artefact.read("images").to_pylist()
    assert [(row["path"], row["encoded"], row["label"]) for row in rows] == [("x.parquet#0", png(0), None), ("x.parquet#1", png(1), None)]
    (row,) = artefact.read("rejected").to_pylist()
    why = "bytes is null and path names a file, which is not looked for" if pa.types.is_struct(type_) else "null: the row has no image"
    assert (row["path"], row["reason"]) == ("x.parquet#2", "empty") and row["detail"].startswith(why)


@pytest.mark.parametrize(
    "labels",
    [pa.array([3, None]), pa.array(["3", None]), pa.array(["3", None]).dictionary_encode(), pa.array([" 3\t", " "])],
    ids=["integer", "string", "category", "blanks"],
)
def test_labels_become_strings(labels, tmp_path, png):
    path = write(tmp_path / "x.parquet", {"picture": pa.array([png(0), png(1)]), "class": labels})
    items = ParquetFiles(source(path, column="picture", label_column="class")).iter_items(range(2))
    assert [item.label for item in items] == ["3", None]


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_taxonomies_are_normalised_and_may_be_missing(type_, tmp_path, png, make):
    paths = pa.array(["animal/dog", None, "", "/animal/bird/"]).cast(type_)
    path = write(tmp_path / "x.parquet", {"image": pa.array([png(seed) for seed in range(4)]), "tree": paths})
    rows = make(source(path, taxonomy_column="tree").model_dump()).read("images")
    assert rows["taxonomy"].to_pylist() == ["animal/dog", None, None, "animal/bird"]


def test_a_taxonomy_with_an_unnamed_class_is_refused_before_any_image_is_read(tmp_path, png):
    paths = pa.array(["a/b"] * 6 + ["a/ /b"])
    path = write(tmp_path / "x.parquet", {"image": pa.array([png(0)] * 7), "tree": paths}, row_group_size=3)
    with pytest.raises(SourceError, match=r"x.parquet, row 6, column 'tree': the taxonomy 'a/ /b' has a class without a name"):
        ParquetFiles(source(path, taxonomy_column="tree"))


def test_a_folder_is_read_in_order_and_only_in_the_row_groups_needed(tmp_path, png, monkeypatch):
    images = [png(seed) for seed in range(20)]
    write(tmp_path / "b/1.parquet", {"image": pa.array(images[12:])}, row_group_size=3)
    write(tmp_path / "a.parquet", {"image": pa.array(images[:12])}, row_group_size=5)
    files = ParquetFiles(source(tmp_path))
    assert files.total == 20
    assert [item.read() for item in files.iter_items(range(20))] == images
    read = []
    original = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda file, n, row_groups, **options: read.append(row_groups) or original(file, n, row_groups, **options),
    )
    assert [(item.path, item.read()) for item in files.iter_items([4, 5, 19])] == [
        ("a.parquet#4", images[4]),
        ("a.parquet#5", images[5]),
        ("b/1.parquet#7", images[19]),
    ]
    assert read == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"column": "images"},
            r"images.source.column is 'images': there is no such column; .*has image \(binary\), size \(double\), count \(int64\)",
        ),
        ({"column": "size"}, r"images.source.column is 'size': holds double, not binary"),
        ({"label_column": "class"}, r"images.source.label_column is 'class': there is no such column; .*x.parquet has image"),
        ({"label_column": "size"}, r"images.source.label_column is 'size': holds double, not strings or integers"),
        ({"taxonomy_column": "tree"}, r"images.source.taxonomy_column is 'tree': there is no such column; .*x.parquet has image"),
        ({"taxonomy_column": "count"}, r"images.source.taxonomy_column is 'count': holds int64, not strings"),
    ],
)
def test_an_unknown_column_is_an_error_that_lists_the_known_ones(changes, said, tmp_path, png):
    path = write(tmp_path / "x.parquet", {"image": pa.array([png(0)]), "size": pa.array([1.5]), "count": pa.array([1])})
    with pytest.raises(SourceError, match=said):
        ParquetFiles(source(path, **changes))


def test_an_empty_source_is_an_error_that_names_the_path(tmp_path, png):
    (tmp_path / "not.parquet").write_bytes(b"no Parquet at all")
    (tmp_path / "empty").mkdir()
    no_rows = write(tmp_path / "no_rows.parquet", {"image": pa.array([], pa.binary())})
    expected = {
        "gone": "no such file or folder",
        "empty": "there are no files named",
        "not.parquet": "cannot be read as Parquet",
        no_rows.name: "no rows",
    }
    for name, said in expected.items():
        with pytest.raises(SourceError, match=said) as caught:
            ParquetFiles(source(tmp_path / name))
        assert str(tmp_path / name) in str(caught.value)


def test_damage_inside_a_file_is_an_error_that_names_it(tmp_path, png):
    path = write(tmp_path / "x.parquet", {"image": pa.array([png(seed) for seed in range(50)])}, compression="zstd")
    data = bytearray(path.read_bytes())
    data[20:400] = b"\xff" * 380
    path.write_bytes(data)
    with pytest.raises(SourceError, match=str(path)):
        list(ParquetFiles(source(path)).iter_items(range(50)))


def test_hidden_files_are_skipped_and_other_unread_files_are_reported(tmp_path, png):
    table = {"image": pa.array([png(0)]), "label": pa.array(["a"]), "caption": pa.array(["b"])}
    for name in ("a.parquet", ".ipynb_checkpoints/a-checkpoint.parquet", ".b.parquet", "C.PARQUET"):
        write(tmp_path / "in" / name, table)
    (tmp_path / "in/readme.txt").write_text("hello")
    write(tmp_path / "elsewhere/d.parquet", table)
    (tmp_path / "in/more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    files = ParquetFiles(source(tmp_path / "in", label_column="label"))
    assert [item.path for item in files.iter_items(range(files.total))] == ["C.PARQUET#0", "a.parquet#0", "more/d.parquet#0"]
    endings, columns = files.notices
    assert endings.endswith("in: 1 file is not read, because its name does not end in .parquet: readme.txt")
    assert "in: 1 column is not read: caption; images.source.label_column" in columns
