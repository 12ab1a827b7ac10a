"""Proves the recipe docs/developers/add-a-params-key.md: a key takes two files, and DVC tracks it even if params.yaml lacks it."""

import json
import re
import textwrap
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from support.recipes import Tree, assert_only_named, blocks_of, copy_tree
from support.study import CHECKOUT
from support.tiles import write_tile_folder

PAGE = "add-a-params-key.md"
CONFIG, STAGE, FOLDER = "src/ommatid/config/images.py", "src/ommatid/images/stage.py", "src/ommatid/images/folder.py"
RUN_VERBS = """
import sys
from support.study import run_verb
for words in sys.argv[1:]:
    if status := run_verb(*words.split("|")):
        sys.exit(f"{words} ended with {status}")
"""


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return copy_tree(tmp_path / "tree")


def add_field(tree: Tree, path: str, before: str, field: str) -> None:
    """Add the field of a class in front of one that it has."""
    tree.replace(path, before, textwrap.indent(field, " " * 4) + before)


def count_images(tree: Tree, work: Path, **overrides: str) -> dict[str, int]:
    """Count the images that the stage `images` of this copy takes from 12 photos, by the name of the override."""
    write_tile_folder(work / "photos", 12)
    source = "images.source={kind: folder, path: photos}"
    words = [
        ("images", "--params", str(tree.root / "params.yaml"), "--data", name, "--set", source, "--set", override)
        for name, override in overrides.items()
    ]
    tree.run("python", "-c", RUN_VERBS, *map("|".join, words), cwd=work)
    return {name: sum(pq.read_metadata(path).num_rows for path in (work / name / "images").glob("images-*.parquet")) for name in overrides}


def test_a_key_of_a_section_takes_the_files_of_its_recipe(tree: Tree, tmp_path: Path) -> None:
    add_field(tree, CONFIG, "    eval_share: Annotated[float, Field(gt=0, lt=1)]\n", blocks_of(PAGE)[0])
    tree.replace(STAGE, "choose(source, params.limit)", "choose(source, params.limit)[params.skip :]")
    assert_only_named(tree, PAGE)
    assert count_images(tree, tmp_path / "work", before="images.limit=null", after="images.skip=5") == {"before": 12, "after": 7}


def test_a_key_of_a_kind_takes_the_files_of_its_recipe(tree: Tree, tmp_path: Path) -> None:
    (last,) = re.findall(r'class FolderSource.*?(    """Folder, .*?"""\n)', (tree.root / CONFIG).read_text(encoding="utf-8"), re.DOTALL)
    tree.replace(CONFIG, last, last + textwrap.indent(blocks_of(PAGE)[1], " " * 4))
    tree.replace(FOLDER, "Folder(params.path)", 'Folder(f"{params.path}/{params.inside}")')
    assert tree.changed() == [CONFIG, FOLDER]
    assert "src/ommatid/images/<kind>.py" in (CHECKOUT / "docs/developers" / PAGE).read_text(encoding="utf-8")
    source = "images.source={kind: folder, path: photos, inside: red}"
    assert count_images(tree, tmp_path / "work", before="images.limit=null", after=source) == {"before": 12, "after": 4}


def test_dvc_knows_a_key_of_extract_that_params_yaml_lacks(tree: Tree, tmp_path: Path) -> None:
    config, before = "src/ommatid/config/extract.py", "    executor: Executor\n"
    add_field(tree, config, before, 'mirrored: bool = False\n"""Whether to mirror the images."""\n')
    write_tile_folder(tmp_path / "photos", 3)
    source = ("--params", str(tree.root / "params.yaml"), "--set", "images.source={kind: folder, path: photos}")

    def sources(*overrides: str) -> dict[str, object]:
        words = "|".join(("sources", *source, *(word for override in overrides for word in ("--set", override))))
        tree.run("python", "-c", RUN_VERBS, words, cwd=tmp_path)
        found = json.loads((tmp_path / "data/sources/extract.json").read_text(encoding="utf-8"))
        return {key: value for key, value in found.items() if key != "code"}

    assert sources() == sources("extract.mirrored=false") == {"extract.mirrored": False}  # so that another default makes it stale
    assert sources("extract.mirrored=true") == {"extract.mirrored": True}
