"""A folder becomes rows in order of path, with labels and captions; every file that is not an image is listed with its reason."""

import os
from pathlib import Path

import pytest

from ommatid.errors import SourceError
from ommatid.images.folder import Folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def source(root: Path) -> dict[str, str]:
    return {"kind": "folder", "path": str(root)}


def test_rows_have_labels_and_captions_in_order_of_path(root, png, make):
    for seed, name in enumerate(["b.png", "dog/2.png", "dog/1.png", "dog/poodle/x.png", "cat/é.png", ".hidden.png", ".thumbs/y.png"]):
        write(root / name, png(seed))
    write(root / "captions.csv", '\ufeffpath,caption\ndog/1.png,"a dog, asleep"\n./b.png,\n'.encode())
    rows = make(source(root)).read("images").to_pylist()
    assert [(row["image"], row["path"], row["label"], row["captions"]) for row in rows] == [
        (0, "b.png", None, []),
        (1, "cat/é.png", "cat", []),
        (2, "dog/1.png", "dog", ["a dog, asleep"]),
        (3, "dog/2.png", "dog", []),
        (4, "dog/poodle/x.png", "dog/poodle", []),
    ]


def test_all_captions_of_an_image_are_kept_and_labels_name_the_classes_of_a_flat_folder(root, png, make):
    for seed, name in enumerate(["a.jpg", "b.jpg", "dog/c.jpg", "dog/e\u0301.jpg"]):
        write(root / name, png(seed))
    lines = [
        "path,caption,label",
        "a.jpg,a dog,dog",
        "a.jpg,it runs,",
        "b.jpg,,cat",
        "a.jpg,a dog,dog",
        "dog/c.jpg,,poodle",
        "dog/\u00e9.jpg,x,",
    ]
    write(root / "captions.csv", "\r\n".join(lines).encode())
    rows = make(source(root)).read("images").to_pylist()
    assert [(row["path"], row["label"], row["captions"]) for row in rows] == [
        ("a.jpg", "dog", ["a dog", "it runs"]),
        ("b.jpg", "cat", []),
        ("dog/c.jpg", "poodle", []),
        ("dog/e\u0301.jpg", "dog", ["x"]),  # the same name in another of Unicode's normal forms
    ]


def test_a_taxonomy_may_come_with_or_without_captions_or_be_missing(root, png, make):
    for seed, name in enumerate(["a.png", "b.png", "c.png", "d.png"]):
        write(root / name, png(seed))
    write(root / "captions.csv", b"taxonomy,path,caption\nanimal/mammal/dog,a.png,a dog\n / animal /bird/,b.png,\n/,c.png,sky\n")
    rows = make(source(root)).read("images").to_pylist()
    assert [(row["taxonomy"], row["captions"]) for row in rows] == [
        ("animal/mammal/dog", ["a dog"]),
        ("animal/bird", []),
        (None, ["sky"]),
        (None, []),
    ]
    write(root / "captions.csv", b"path;taxonomy\nb.png;animal\nc.png;\n")
    rows = make(source(root), "other").read("images").to_pylist()
    assert [(row["taxonomy"], row["captions"]) for row in rows] == [(None, []), ("animal", []), (None, []), (None, [])]


def test_every_file_that_is_not_an_image_is_listed(root, png, make):
    write(root / "a.png", png(0))
    write(root / "deep/captions.csv", b"path,caption\n")
    write(root / "empty.jpg", b"")
    write(root / "half.png", png(1)[:90])
    write(root / "notes.txt", b"not a picture")
    write(root / "twin.png", png(0))
    artefact = make(source(root))
    assert [(row["path"], row["reason"]) for row in artefact.read("rejected").to_pylist()] == [
        ("deep/captions.csv", "not_an_image"),
        ("empty.jpg", "empty"),
        ("half.png", "truncated"),
        ("notes.txt", "not_an_image"),
        ("twin.png", "duplicate"),
    ]
    assert artefact.read("rejected").to_pylist()[-1]["detail"] == "a.png"
    counts = {name: artefact.summary[name] for name in ("n_seen", "n_images", "n_rejected", "n_duplicates", "rejected_share")}
    assert counts == {"n_seen": 6, "n_images": 1, "n_rejected": 4, "n_duplicates": 1, "rejected_share": 4 / 6}


def test_loops_of_links_end_and_linked_folders_are_read_once(root, tmp_path, png):
    write(root / "z/1.png", png(0))
    (root / "a").symlink_to(root / "z", target_is_directory=True)
    (root / "z/up").symlink_to(root, target_is_directory=True)
    (root / "self").symlink_to(root / "self")
    write(tmp_path / "elsewhere/2.png", png(1))
    (root / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "more too").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert [item.path for item in Folder(root).iter_items(range(3))] == ["more/2.png", "self", "z/1.png"]


def test_files_that_cannot_be_opened_are_rejected_and_pipes_are_skipped(root, png, make):
    write(root / "a.png", png(0))
    (root / "dangling.png").symlink_to(root / "gone.png")
    os.mkfifo(root / "pipe.png")
    rejected = make(source(root)).read("rejected").to_pylist()
    assert rejected == [{"path": "dangling.png", "reason": "unreadable", "detail": "No such file or directory"}]


def test_a_file_that_disappears_while_the_stage_runs_is_rejected(root, png):
    path = write(root / "a.png", png(0))
    (item,) = Folder(root).iter_items([0])
    path.unlink()
    with pytest.raises(FileNotFoundError):
        item.read()


def test_a_name_that_is_not_unicode_is_escaped(root, png, make):
    write(Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9/1.png")), png(0))
    (row,) = make(source(root)).read("images").to_pylist()
    assert (row["path"], row["label"]) == ("caf\\xe9/1.png", "caf\\xe9")


def test_a_relative_path_is_relative_to_the_current_directory(root, png, make, monkeypatch):
    write(root / "a.png", png(0))
    monkeypatch.chdir(root.parent)
    assert make(source(Path("photos"))).summary["n_images"] == 1


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "hidden"])
def test_an_empty_source_is_an_error_that_says_what_to_do(kind, root, png):
    path = {"missing": root / "missing", "file": write(root / "f/x.png", png(0)), "empty": root, "hidden": root}[kind]
    if kind in ("empty", "hidden"):
        (root / "f/x.png").unlink()
    if kind == "hidden":
        write(root / ".x.png", png(0))
    with pytest.raises(SourceError, match=r"images\.source\.path") as caught:
        Folder(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"file,text\na.png,x\n", "line 1 names none of the columns path, caption, label, taxonomy; it needs path"),
        (b"", "is empty"),
        (b"path,text\na.png,x\n", "line 1 has the columns path, text; it needs path and one of caption, label, taxonomy"),
        (b"path,capton,label\na.png,x,y\n", "is 'capton' meant to be caption"),
        (b"path,caption,path\na.png,x,y\n", "columns path, caption, path; it needs path, each once"),
        (b"path,caption\n\xff\xfe,x\n", "line 2, can't decode byte 13: not UTF-8"),
        ("path,caption\na.png,x\n".encode("utf-16"), "is UTF-16"),
        (b"path,caption\na.png,a dog, running\n", "line 2, 3 cells and 2 columns; put a value with a comma between quotation marks"),
        (b"path,caption,\na.png,a dog, running\n", "line 2, 3 cells and 2 columns; put a value with a comma between quotation marks"),
        (b"path,caption\na.png\n", "line 2, 1 cells and 2 columns; fill in the rest"),
        (b'path,caption\na.png,x\n\na.png,"x\nb.png,y\n', "line 4, not CSV .*quotation mark that is not closed"),
        (b"path,caption\n,x\n", "line 2, column path: is empty"),
        (b"path,taxonomy\na.png,x/y\na.png,x//y\n", "line 3, the taxonomy 'x//y' has a class without a name"),
        (b"path,label\na.png,x\na.png,y\n", "line 3, column label: 'y', but an earlier line has 'x' for the same image"),
        (b"path,caption\n/photos/a.png,x\n", "1 of 1 images named there do not exist in the folder: '/photos/a.png'; write paths relative"),
        (
            b"path,caption\nA.PNG,x\nb\\c.png,y\nz.png,z\na.png,a\n",
            r"3 of 4 images .*'A.PNG' \(is 'a.png' meant\?\), .* \(is 'b/c.png' meant",
        ),
    ],
)
def test_captions_that_cannot_be_used_are_an_error(text, said, root, png):
    write(root / "a.png", png(0))
    write(root / "b/c.png", png(1))
    write(root / "captions.csv", text)
    with pytest.raises(SourceError, match=said) as caught:
        Folder(root)
    assert str(root / "captions.csv") in str(caught.value)


def test_empty_cells_at_the_end_of_lines_are_ignored_as_in_spreadsheets(root, png):
    write(root / "a.png", png(0))
    write(root / "captions.csv", b"path,caption,,\na.png,a dog,,\na.png,it runs\na.png,it barks,,,,\n,,,\n")
    assert Folder(root).notices == []
    assert [item.captions for item in Folder(root).iter_items([0])] == [("a dog", "it runs", "it barks")]


def test_a_column_without_a_name_is_named_in_a_notice(root, png):
    write(root / "a.png", png(0))
    write(root / "captions.csv", b",path,caption\n0,a.png,a dog\n")
    assert Folder(root).notices == [f"{root / 'captions.csv'}: 1 column is not used: ''"]


def test_rows_and_columns_that_are_not_used_are_counted(root, png):
    for seed, name in enumerate(["a.png", "b.png", "c.png"]):
        write(root / name, png(seed))
    write(root / "captions.csv", b"path,caption,split\na.png,x,train\nb.png,y,train\nC.png,z,test\ngone.png,z,test\n")
    columns, rows = Folder(root).notices
    assert columns.endswith("captions.csv: 1 column is not used: split")
    assert rows.endswith("captions.csv: 2 of 4 images named there do not exist in the folder: 'C.png' (is 'c.png' meant?), 'gone.png'")


def test_annotation_files_that_are_not_read_are_named(root, png):
    for name in ("a.png", "Captions.csv", "metadata.jsonl", "b/captions.csv", "b/\x1b[2J.json"):
        write(root / name, png(0))
    (notice,) = Folder(root).notices
    assert notice.endswith(
        "4 files are not read, as annotations are only read from captions.csv at the top: "
        "Captions.csv, 'b/\\x1b[2J.json', b/captions.csv and 1 more"
    )


def test_the_content_of_a_linked_captions_file_is_not_shown(root, tmp_path, png):
    write(root / "a.png", png(0))
    (root / "captions.csv").symlink_to(write(tmp_path / "secret", b"the password is hunter2\nhunter3\n"))
    with pytest.raises(SourceError, match="line 1 names none of the columns") as caught:
        Folder(root)
    assert "hunter" not in str(caught.value)


def test_the_fingerprint_follows_names_sizes_and_times(root, png):
    write(root / "a.png", png(0))
    first = Folder(root).fingerprint
    assert Folder(root).fingerprint == first
    os.utime(root / "a.png", (1, 1))
    assert (second := Folder(root).fingerprint) != first
    write(root / "captions.csv", b"path,caption\na.png,x\n")
    assert Folder(root).fingerprint != second
