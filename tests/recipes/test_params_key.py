"""Proves the recipe docs/developers/add-a-params-key.md: a key of a kind takes two files, a key of a section params.yaml besides."""

import re
import textwrap
from pathlib import Path

import pyarrow.parquet as pq

from support.recipes import Tree, assert_only_named, blocks_of, copy_tree
from support.tiles import write_tile_folder

PAGE = "add-a-params-key.md"
CONFIG, STAGE = "src/ommatid/config/images.py", "src/ommatid/images/stage.py"


def paths_of(tree: Tree, work: Path, *overrides: str) -> list[str]:
    """Path of each image that the stage `images` of this copy takes from 12 photos."""
    write_tile_folder(work / "photos", 12)
    arguments = [word for override in ("images.source={kind: folder, path: photos}", *overrides) for word in ("--set", override)]
    tree.run("python", "-m", "ommatid", "images", "--params", str(tree.root / "params.yaml"), *arguments, cwd=work)
    (table,) = (pq.read_table(path, columns=["path"]) for path in (work / "data/images").glob("images*.parquet"))
    return table["path"].to_pylist()


def test_a_key_of_a_kind_takes_the_files_of_its_recipe(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    (last,) = re.findall(r'class FolderSource.*?(    """Folder, .*?"""\n)', (tree.root / CONFIG).read_text(encoding="utf-8"), re.DOTALL)
    tree.replace(CONFIG, last, last + textwrap.indent(blocks_of(PAGE)[0], " " * 4))
    tree.replace(STAGE, "Folder(params.path)", 'Folder(f"{params.path}/{params.inside}")')
    assert_only_named(tree, PAGE)
    key = "images.source={kind: folder, path: photos, inside: red}"
    assert len(paths_of(tree, tmp_path / "all")) == 12
    assert len(paths_of(tree, tmp_path / "some", key)) == 4


def test_a_key_of_a_section_stands_in_params_yaml_too(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    field = "    eval_share: Annotated[float, Field(gt=0, lt=1)]\n"
    new = '    skip: Annotated[int, Field(ge=0)]\n    """Leave out so many images at the beginning of the source."""\n'
    assert field in (tree.root / CONFIG).read_text(encoding="utf-8")
    tree.replace(CONFIG, field, new + field)
    tree.replace("params.yaml", "images:\n", "images:\n  skip: 2\n")
    tree.replace(STAGE, "spread(source.total, params.limit)", "spread(source.total, params.limit)[params.skip :]")
    assert tree.changed() == ["params.yaml", CONFIG, STAGE]
    assert len(paths_of(tree, tmp_path / "work")) == 10
    assert len(paths_of(tree, tmp_path / "other", "images.skip=5")) == 7
