"""Proves the recipe "How to add a gate": one changed file brings a check that passes, and fails when its bound is absurd."""

import json
import textwrap
from pathlib import Path

import pytest
import yaml

from support.recipes import Tree, assert_only_named, blocks_of, copy_tree
from support.study import make_test_params
from support.tiles import write_tile_folder

PAGE = "add-a-gate.md"
FILE = "src/ommatid/quality/images.py"
TITLE = "no image is huge"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A folder with params.yaml and pictures of 48 x 32 pixels."""
    write_tile_folder(tmp_path / "study/photos", 12)
    params = make_test_params(images={"source": {"kind": "folder", "path": "photos"}, "limit": None})
    (tmp_path / "study/params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    return tmp_path / "study"


def follow(tree: Tree) -> None:
    """Follow the recipe."""
    tree.replace(FILE, "    count(*) AS rows,\n", f"    count(*) AS rows,\n    {blocks_of(PAGE, 'text')[0]}")
    tree.replace(FILE, "    return [\n", "    return [\n" + textwrap.indent(blocks_of(PAGE)[0], " " * 8))


def check_of(study: Path) -> dict[str, object]:
    report = json.loads((study / "data/quality/images.json").read_text(encoding="utf-8"))
    return next(check for check in report["checks"] if check["name"] == TITLE)


def test_a_gate_takes_one_file(tmp_path: Path, study: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    follow(tree)
    assert_only_named(tree, PAGE)
    assert tree.changed() == [FILE]

    tree.run("python", "-m", "ommatid", "images", cwd=study)
    assert (check_of(study)["success"], check_of(study)["observed"]) == (True, "largest side: 48")

    (study / "data/images").rename(study / "passed")
    tree.replace(FILE, "max_value=20_000", "max_value=1")
    with pytest.raises(AssertionError, match=f"quality gate failed: {TITLE}: part images-00000.parquet: largest side 48"):
        tree.run("python", "-m", "ommatid", "images", cwd=study)
    assert check_of(study)["success"] is False
    assert not (study / "data/images").exists()
