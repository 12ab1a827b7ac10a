"""Proves that labels by people are read as they were written, that every problem in a file is named, and that a retrain loses no name."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ommatid.config.label import HumanLabeller, names_checksum
from ommatid.errors import ConfigError
from ommatid.label.labellers.human import load_labels, load_names
from ommatid.reviews import ReviewLog

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


OLD = "topk-8-k2-s0-99999999"


class Weights:
    """An SAE of which only the directions matter."""

    def __init__(self, folder: Path, directions: np.ndarray) -> None:
        folder.mkdir(parents=True)
        save_file({"W_dec": directions.astype(np.float32)}, folder / "sae.safetensors")
        self._folder = folder

    def file(self, name: str) -> Path:
        return self._folder / name


@pytest.fixture
def log(tmp_path: Path) -> ReviewLog:
    return ReviewLog(tmp_path / "reviews" / "log.jsonl")


@pytest.fixture
def saes(tmp_path: Path) -> dict[str, Any]:
    """Two SAEs: a retrained one with the old latents shifted by one, and a smaller one with half of them."""
    return {ONE: Weights(tmp_path / "one", np.roll(np.eye(8), -1, axis=0)), TWO: Weights(tmp_path / "two", 3 * np.eye(8)[:4])}


def say(log: ReviewLog, sae: str, latent: int, kind: str, value: str | int) -> str:
    directions = np.roll(np.eye(8), -1, axis=0) if sae == ONE else np.eye(8)
    return log.append("Ada", sae, latent, kind, value, direction=lambda: directions[latent]).id


def test_names_are_found_again_in_every_sae_of_the_training(log: ReviewLog, saes: dict[str, Any]) -> None:
    heard: list[str] = []
    say(log, OLD, 3, "rename", "horse")
    say(log, OLD, 0, "rename", "dog")
    say(log, OLD, 5, "rate", 1)
    say(log, OLD, 6, "rename", "sky")
    say(log, OLD, 6, "rename", "")
    assert load_names(str(log.path), saes, heard.append) == {ONE: {2: "horse", 7: "dog"}, TWO: {3: "horse", 0: "dog"}}
    undone = say(log, ONE, 2, "rename", "pony")  # the same feature, in the retrained SAE
    say(log, ONE, 4, "rename", "cat")
    assert load_names(str(log.path), saes, heard.append) == {ONE: {2: "pony", 7: "dog", 4: "cat"}, TWO: {3: "pony", 0: "dog"}}
    log.undo("Bo", undone)
    assert load_names(str(log.path), saes, heard.append)[ONE][2] == "horse"
    assert heard == []  # what is in one of the SAEs is not lost


def test_names_of_features_that_no_sae_has_are_counted(log: ReviewLog, saes: dict[str, Any]) -> None:
    heard: list[str] = []
    say(log, OLD, 3, "rename", "horse")
    log.append("Ada", OLD, 7, "rename", "gone", direction=lambda: np.ones(8))
    with log.path.open("a") as file:
        file.write("half a li")
    assert load_names(str(log.path), saes, heard.append)[ONE] == {2: "horse"}
    assert "1 lines of the log of reviews are left out; the first: the last line has no end" in heard[0]
    assert "1 of 2 named features are not in this training" in heard[1]


def test_a_log_without_names_has_no_labels_and_is_no_error(log: ReviewLog, saes: dict[str, Any]) -> None:
    heard: list[str] = []
    assert load_names(str(log.path), saes, heard.append) == {ONE: {}, TWO: {}}
    say(log, OLD, 3, "rate", 5)
    assert load_names(str(log.path), saes, heard.append) == {ONE: {}, TWO: {}}
    assert len(heard) == 2 and all("nobody has named a feature yet" in line for line in heard)


def test_only_names_make_labels_stale(log: ReviewLog) -> None:
    """The checksum is the same before and after everything else that people say, and another one after every change of a name."""
    labeller = HumanLabeller(kind="human", path=str(log.path))

    def checksum() -> str | None:
        found = names_checksum(log.path)
        assert labeller.identity()["files"] == {str(log.path): found}
        return found

    assert checksum() is None
    say(log, OLD, 3, "rate", 5)
    assert checksum() is None
    name = say(log, OLD, 3, "rename", "horse")
    seen = [checksum()]
    log.undo("Ada", say(log, OLD, 4, "comment", "rename"))
    with log.path.open("a") as file:
        file.write('half a li\n[1]\n{"kind": "undo", "value": ["x"]}\n')
    assert checksum() == seen[0]
    undo = log.undo("Ada", name)
    seen.append(checksum())
    log.undo("Ada", undo.id)
    seen.append(checksum())
    say(log, OLD, 3, "rename", "pony")
    seen.append(checksum())
    assert None not in seen and len(set(seen)) == 4


def test_ratings_of_similar_features_do_not_move_names(log: ReviewLog, tmp_path: Path) -> None:
    """A feature that was only rated is more similar to the latent than the one with the name, which gets it all the same."""
    near = np.array([1, 0.3, 0, 0, 0, 0, 0, 0])
    sae: Any = {ONE: Weights(tmp_path / "sae", np.eye(8)[:1])}
    log.append("Ada", OLD, 0, "rename", "horse", direction=lambda: near)
    before = load_names(str(log.path), sae, pytest.fail)
    say(log, OLD, 1, "rate", 5)
    log.append("Ada", OLD, 2, "rate", 5, direction=lambda: np.eye(8)[0])
    assert load_names(str(log.path), sae, pytest.fail) == before == {ONE: {0: "horse"}}
