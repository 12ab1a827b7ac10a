"""Proves that files that people write are read strictly: nothing is ambiguous, and no document can harm its reader."""

import json
from pathlib import Path

import pytest

from ommatid.config import load_params
from ommatid.config.strict_yaml import DEEPEST, parse_json, parse_yaml
from ommatid.errors import ConfigError, SourceError
from ommatid.images.npm_archive import load_pin
from ommatid.images.shapes import load_plan
from support.study import CHECKOUT

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
"""YAML with 387 million strings once its aliases are resolved."""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("k: 1\nl: 2\nk: 3", "f: line 3: the key 'k' is given twice, first on line 1; keep one"),
        ("train: {k: 1, lr: 2, k: 3}", "f: line 1: the key 'k' is given twice, first on line 1; keep one"),
        ("- {k: 1}\n- a:\n    k: 1\n    'k': 1", "f: line 4: the key 'k' is given twice, first on line 3"),
        ("k: " + "[" * 100_000, "f: nested more than 50 levels deep"),
        ("k: " + "[" * 60 + "]" * 60, "f: nested more than 50 levels deep"),
        ("{a: " * 100_000, "f: nested more than 50 levels deep"),
        ("- " * 100_000 + "a", "f: nested more than 50 levels deep"),
        ("k: &a [*a]", "f: nested more than 50 levels deep"),
        (BOMB, "f: holds more than 1,000,000 values with its aliases (*name) resolved"),
        ("k: [1, 2", "f: not valid YAML: line 1, column 9: expected ',' or ']'"),
        ("k: 2026-13-45", "f: not valid YAML: month must be in 1..12"),
        ("k: " + "1" * 10_000, "f: not valid YAML: Exceeds the limit"),
        ("k: !!python/object:os.system {}", "f: not valid YAML: line 1, column 4: could not determine a constructor"),
        ("{[1]: 2}", "f: not valid YAML: line 1, column 2: found unhashable key"),
        ("a: 1\n---\nb: 2", "f: not valid YAML: line 2, column 1: but found another document"),
        ("k: \x07", "f: not valid YAML: unacceptable character #x0007"),
        ("k: 1\nl: 010", "f: line 2: some YAML parsers read 010 as an octal number, others as a decimal one"),
        ("k: [1, 1:30]", "f: line 1: some YAML parsers read 1:30 as a number to base 60, others as a string"),
        ("k: yes", "f: line 1: some YAML parsers read yes as a boolean, others as a string; write true or false"),
        ("off: 1", "f: line 1: some YAML parsers read off as a boolean"),
    ],
)
def test_ambiguous_or_unsafe_yaml_is_refused_in_one_short_line(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_yaml(text, "f")
    assert str(error.value).startswith(says)
    assert len(str(error.value)) < 300 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.k=true", "train: k is true, where a number is expected"),
        ("train.lr=false", "train: lr is false, where a number is expected"),
        ("train.runs=[{k: true}]", "k is true, where a number is expected"),
        ('images.source={kind: folder, path: ""}', "images.source: path is empty; set it to where the files are"),
        ('images.source.path="a\\0b"', "images.source: path contains a character that is not allowed in text and file names"),
        ('extract.hookpoints=["\\ud800"]', "extract: hookpoints contains a character that is not allowed in text and file names"),
    ],
)
def test_values_that_yaml_would_read_as_another_type_are_refused(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_params(CHECKOUT / "params.yaml", [override])
    assert says in str(error.value)


def test_ordinary_yaml_is_read_as_before() -> None:
    assert parse_yaml("a: 'yes'\nb: '010'\nc: 0\nd: 0x10\ne: True\nf: -0.5\n", "f") == {
        "a": "yes", "b": "010", "c": 0, "d": 16, "e": True, "f": -0.5,
    }  # fmt: skip
    assert parse_yaml("a: &x {k: 1}\nb: {<<: *x, l: [0.1, null, 2026-01-02]}\n", "f")["b"]["k"] == 1
    assert parse_yaml("", "f") is None
    assert parse_yaml("[" * (DEEPEST - 1) + "]" * (DEEPEST - 1), "f")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"seed": 1, "size": 2, "seed": 3}', "the key 'seed' is given twice; keep one"),
        ("[" * 100_000, "nested more than 50 levels deep"),
        ("{", "not valid JSON: Expecting property name"),
    ],
)
def test_plans_and_pins_are_read_as_strictly(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_json(text, "f")
    assert str(error.value).startswith(f"f: {says}")
    path = tmp_path / "plan.json"
    path.write_text(text)
    for load in (load_plan, load_pin):
        with pytest.raises(SourceError) as refused:
            load(path)
        assert str(refused.value).startswith(f"{path}: not a p") and says in str(refused.value)
    assert load_plan(CHECKOUT / "data/shapes.json").n_images == json.loads((CHECKOUT / "data/shapes.json").read_text())["n_images"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.k=" + "[" * 100_000, "--set train.k: nested more than 50 levels deep"),
        ("images.source={kind: folder, path: a, path: b}", "line 1: the key 'path' is given twice"),
        ("train.k={", "--set 'train.k={': not valid YAML"),
    ],
)
def test_values_of_the_command_line_are_read_as_strictly(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_params(CHECKOUT / "params.yaml", [override])
    assert says in str(error.value) and len(str(error.value)) < 400


def test_params_yaml_names_the_line_of_a_key_given_twice(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    text = (CHECKOUT / "params.yaml").read_text()
    path.write_text(text.replace("  epochs: 10\n", "  epochs: 10\n  k: 99\n"))
    with pytest.raises(ConfigError, match=r"params\.yaml: line \d+: the key 'k' is given twice, first on line \d+; keep one"):
        load_params(path)
    path.write_bytes(b"\xff\xfe" + text.encode("utf-16-le"))
    with pytest.raises(ConfigError, match="save it as UTF-8"):
        load_params(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_params(tmp_path)
