"""Proves the recipes add-a-metric.md and add-a-relation.md in docs/developers: three files each, and one run of the pipeline fills both."""

from pathlib import Path

import yaml

from ommatid.catalog.reader import Catalog
from support.recipes import Tree, assert_only_named, blocks_of, copy_tree
from support.study import make_test_params
from support.tiles import write_tile_folder

RELATION, METRIC = "add-a-relation.md", "add-a-metric.md"
SCHEMAS, DICTIONARIES = "src/ommatid/schemas.py", "src/ommatid/evaluate/passes.py"
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
for verb in ("images", "extract", "train", "evaluate", "label", "intervene", "catalog"):
    if status := run_verb(verb):
        sys.exit(f"{verb} ended with {status}")
"""
N_LATENTS = 24


def add_relation(tree: Tree) -> None:
    """Follow the recipe for relations."""
    before = '\n        "cofiring": structure.cofiring,'
    (stage,) = (path for path in (tree.root / "src/ommatid/evaluate").glob("*.py") if before in path.read_text(encoding="utf-8"))
    tree.write(SCHEMAS, (tree.root / SCHEMAS).read_text(encoding="utf-8") + "\n" + blocks_of(RELATION)[0])
    tree.write("src/ommatid/catalog/sql/silence.sql", blocks_of(RELATION, "text")[0])
    tree.replace(stage.relative_to(tree.root).as_posix(), before, ROWS + before)


def add_metric(tree: Tree) -> None:
    """Follow the recipe for metrics."""
    column, write = blocks_of(METRIC, "text")
    tree.write("src/ommatid/metrics/variation.py", blocks_of(METRIC)[0])
    last = "    duplicate_of=(\n        nullable(pa.int32()),"
    tree.replace(SCHEMAS, last, f"    {column}{last}")
    before = "from ommatid.sae.baselines import"
    tree.replace(DICTIONARIES, before, f"from ommatid.metrics.variation import Variation\n{before}")
    tree.replace(DICTIONARIES, '"judged", "top")', '"judged", "top", "variation")')
    before = "        self.firing = Firing(d_latents)\n"
    tree.replace(DICTIONARIES, before, f"{before}        self.variation = Variation(d_latents)\n")
    before = "        self.firing.add(acts, pooled)\n"
    tree.replace(DICTIONARIES, before, f"{before}        self.variation.add(acts)\n")
    before = '        "duplicate_of": '
    tree.replace(DICTIONARIES, before, f"        {write}{before}")


def run_pipeline(tree: Tree, work: Path) -> Path:
    """Run all stages of this copy on pictures of tiles; returns the catalogue."""
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
    return work / "data/catalog/catalog.duckdb"


def test_a_relation_and_a_metric_take_the_files_of_their_recipes(tmp_path: Path) -> None:
    tree, other = copy_tree(tmp_path / "tree"), copy_tree(tmp_path / "other")
    add_relation(other)
    assert_only_named(other, RELATION)
    add_metric(tree)
    assert_only_named(tree, METRIC)
    add_relation(tree)

    with Catalog(run_pipeline(tree, tmp_path / "work")) as catalog:
        comments = {relation: {column.name: column.comment for column in columns} for relation, columns in catalog.relations().items()}
        (relation,) = catalog.rows("SELECT comment FROM duckdb_tables() WHERE table_name = 'silence'")
        silence = catalog.rows("SELECT count(*), bool_and(share IS NULL = is_dead) FROM silence JOIN latents USING (sae, latent)")
        variation = catalog.rows("SELECT count(*), bool_and(variation IS NULL = is_dead), min(variation) >= 0 FROM features")
    assert relation == ("silence(sae, latent): how rarely a latent fires.",)
    assert comments["silence"]["share"] == "share of evaluation tokens on which it does not fire; null if it never fires"
    assert silence == [(N_LATENTS, True)]
    assert comments["features"]["variation"].startswith("standard deviation over mean of its activations where it fires")
    assert list(comments["features"])[-2:] == ["top_classes", "variation"]
    assert variation == [(N_LATENTS, True, True)]
