"""Proves the recipe docs/developers/add-a-relation.md: a new relation takes three files, and the pipeline then fills and checks it."""

import json
from pathlib import Path

import yaml

from support.recipes import assert_only_named, blocks_of, copy_tree
from support.study import make_test_params
from support.tiles import write_tile_folder

PAGE = "add-a-relation.md"
ROWS = """
        "silence": pa.Table.from_pylist(
            [
                {"sae": name, "latent": latent, "share": 1 - density if density else None}
                for latent, density in enumerate(trained.firing.density.tolist())
            ],
            schema=schemas.SILENCE,
        ),"""
RUN_VERBS = """
import sys
from support.study import run_verb
for verb in ("images", "extract", "train", "evaluate", "label", "catalog"):
    if status := run_verb(verb):
        sys.exit(f"{verb} ended with {status}")
"""
N_LATENTS = 24


def test_a_new_relation_takes_the_files_of_its_recipe(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    schemas, before = "src/ommatid/schemas.py", '\n        "cofiring": structure.cofiring,'
    (stage,) = (path for path in (tree.root / "src/ommatid/evaluate").glob("*.py") if before in path.read_text(encoding="utf-8"))
    tree.write(schemas, (tree.root / schemas).read_text(encoding="utf-8") + "\n" + blocks_of(PAGE)[0])
    tree.write("src/ommatid/catalog/sql/silence.sql", blocks_of(PAGE, "text")[0])
    tree.replace(stage.relative_to(tree.root).as_posix(), before, ROWS + before)
    assert_only_named(tree, PAGE)

    work = tmp_path / "work"
    write_tile_folder(work / "photos", 90)
    (work / "words.txt").write_text("red\ngreen\nblue\ngrey\ncar\nhorse\n")
    params = make_test_params(
        images={"source": {"kind": "folder", "path": "photos"}, "limit": None},
        extract={"model": {"kind": "lite", "image_size": 64}, "judge": {"kind": "lite", "variant": "lite2", "image_size": 64}},
        train={"d_sae": N_LATENTS, "k": 2, "epochs": 30, "batch_size": 64, "max_dead": 0.9},
        label={"labellers": [{"kind": "vocabulary", "words": ["words.txt"]}], "min_examples": 2},
    )
    (work / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")))
    tree.run("python", "-c", RUN_VERBS, cwd=work)

    def ask(sql: str) -> list[dict[str, object]]:
        return json.loads(tree.run("python", "-m", "ommatid", "query", sql, "--format", "json", cwd=work))

    (counted,) = ask("SELECT count(*) AS n, bool_and(share IS NULL = is_dead) AS fits FROM silence JOIN latents USING (sae, latent)")
    assert counted == {"n": N_LATENTS, "fits": True}
    (table,) = ask("SELECT comment FROM duckdb_tables() WHERE table_name = 'silence'")
    assert table["comment"] == "silence(sae, latent): how seldom a latent fires."
    (column,) = ask("SELECT comment FROM duckdb_columns() WHERE table_name = 'silence' AND column_name = 'share'")
    assert column["comment"] == "share of evaluation tokens on which it does not fire; null if it never fires"
