"""Proves that labels by people are read as they were written, and that every problem in a file is named by line and column."""

from pathlib import Path

import pytest

from ommatid.errors import ConfigError
from ommatid.label.labellers.human import load_labels

ONE, TWO = "topk-8-k2-s0-0a1b2c3d", "topk-4-k2-s0-ffffffff"


def write(folder: Path, text: str, encoding: str = "utf-8") -> str:
    path = folder / "labels.csv"
    path.write_bytes(text.encode(encoding))
    return str(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_labels_of_one_sae_are_read(tmp_path: Path, encoding: str) -> None:
    text = 'label,latent\r\n horse ,3\r\n"wheels, in a row",7\r\n\r\n,5\r\n"two\nlines",0\r\nкот,1\r\n'
    path = write(tmp_path, text, encoding)
    assert load_labels(path, {ONE: 8}) == {ONE: {3: "horse", 7: "wheels, in a row", 0: "two\nlines", 1: "кот"}}


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_delimiters_of_spreadsheets_are_recognised(tmp_path: Path, delimiter: str) -> None:
    path = write(tmp_path, f"latent{delimiter}label\n3{delimiter}horse, or pony\n")
    assert load_labels(path, {ONE: 8}) == {ONE: {3: "horse, or pony"}}


def test_several_saes_are_named_with_or_without_their_checksum(tmp_path: Path) -> None:
    path = write(tmp_path, f"sae,latent,label\n{ONE},7,a\ntopk-4-k2-s0,3,b\n")
    assert load_labels(path, {ONE: 8, TWO: 4}) == {ONE: {7: "a"}, TWO: {3: "b"}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("latent,label\n8,horse\n", r"line 2, column latent: got '8'; topk-8-k2-s0-0a1b2c3d has latents 0 to 7"),
        ("latent,label\n1,horse\n-1,horse\n", "line 3, column latent: got '-1'"),
        ("latent,label\nx,horse\n", "line 2, column latent: got 'x'"),
        ("latent,label\n1,horse\n2,dog\n1,cat\n", "line 4, column latent: latent 1 has a label on line 2 already"),
        ("latent,label\n1,wheels, in a row\n", "line 2, 3 cells and 2 columns; put a value with a comma between quotation marks"),
        ("latent,label,sae\n1,horse,topk-16\n", f"line 2, column sae: got 'topk-16'; this training has {ONE}"),
        ("latent,label,sae\n1,horse,\n", "line 2, column sae: got ''"),
        ("latent,lable\n1,horse\n", "line 1 has the columns latent, lable; it needs latent, label"),
        ("latent,label,label\n1,horse,pony\n", "line 1 has the columns latent, label, label; it needs latent, label, each once"),
        ("latent,label,sea\n1,horse,x\n", "line 1 has the columns latent, label, sea; is 'sea' meant to be sae"),
        ("latent,label,by\n1,horse,x\n", "line 1 has the columns latent, label, by; it needs latent, label, and takes no other"),
        ("Latent,Label\n1,horse\n", "line 1 names none of the columns latent, label, sae; it needs .*is 'Latent' meant to be latent"),
        ("", "is empty"),
        ('latent,label\n1,"horse\n2,"dog"\n', "line 2, not CSV"),
        ('latent,label\n1,horse\n2,"dog\n', "line 3, not CSV"),
        ("latent,label\n1,\n", "has no label"),
        ("latent,label\n9,a\n1,b\n10,c\n", "line 2, .*; line 4, "),
        ("latent,label\n" + "9,a\n" * 12, "line 2, .*; line 11, .*; and 2 more"),
    ],
)
def test_problems_are_named_by_line_and_column(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=rf"label\.labellers: .*labels\.csv: {says}"):
        load_labels(path, {ONE: 8})


def test_with_several_saes_the_file_must_say_which(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 1 has the columns latent, label; it needs latent, label, sae"):
        load_labels(write(tmp_path, "latent,label\n1,horse\n"), {ONE: 8, TWO: 4})


def test_labels_of_another_training_are_refused(tmp_path: Path) -> None:
    """The SAE has the same name but other weights, and therefore other latents."""
    with pytest.raises(ConfigError, match="line 2, column sae: got 'topk-8-k2-s0-99999999'"):
        load_labels(write(tmp_path, "latent,label,sae\n1,horse,topk-8-k2-s0-99999999\n"), {ONE: 8})


@pytest.mark.parametrize(("content", "says"), [(None, "No such file"), (b"latent,label\n1,\xe9\n", "line 2, can't decode")])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(ConfigError, match=f"labels.csv: {says}.*; (give a CSV file|save it as CSV) in UTF-8"):
        load_labels(str(tmp_path / "labels.csv"), {ONE: 8})
