"""Proves that a kind is added by exactly the files that its recipe names, by following docs/developers in a copy of the tree."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from ommatid.config import load_params
from support.recipes import Tree, assert_only_named, copy_tree
from support.study import CHECKOUT


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return copy_tree(tmp_path / "tree")


def examples_of(page: str) -> Iterator[str]:
    """The blocks of Python in a recipe, in order, without their indent."""
    text = (CHECKOUT / "docs/developers" / page).read_text(encoding="utf-8")
    for block in re.findall(r"^   ```python\n(.*?)^   ```$", text, re.MULTILINE | re.DOTALL):
        yield re.sub(r"^   ", "", block, flags=re.MULTILINE)


def declare(tree: Tree, path: str, section: str, before: str, union: str, last: str) -> None:
    """Add a section of params to a file, and its class after the last member of the union."""
    (name,) = re.findall(r"^class (\w+)", section)
    tree.replace(path, before, f"{section}\n\n{before}")
    tree.replace(path, f"{union}{last}", f"{union}{last} | {name}")


def test_a_variant_takes_the_files_of_its_recipe(tree: Tree, tmp_path: Path) -> None:
    section, module = examples_of("add-a-variant.md")
    union = "TrainedVariant = TopK | BatchTopK | Matryoshka | ReLU | JumpReLU | Gated | "
    declare(tree, "src/ommatid/config/variants.py", section, "class Imported(Section):", union, "Archetypal")
    tree.write("src/ommatid/sae/variants/annealed.py", module)
    tree.replace("params.yaml", "gated, archetypal", "gated, archetypal, annealed")
    assert_only_named(tree, "add-a-variant.md")

    work = tmp_path / "work"
    work.mkdir()
    np.save(work / "vectors.npy", np.random.default_rng(0).normal(size=(600, 8)).astype(np.float16))
    params = load_params(CHECKOUT / "params.yaml").model_dump(mode="json")
    params["extract"] = {"source": "files", "path": "vectors.npy", "name": "given", "model": "somebody's", "eval_share": 0.2}
    params["train"] |= {"variant": "annealed", "d_sae": 16, "k": 3, "epochs": 4, "batch_size": 64, "max_dead": 1.0}
    (work / "params.yaml").write_text(yaml.safe_dump(params))
    tree.run("python", "-c", "from support.study import run_verb; assert not run_verb('extract') and not run_verb('train')", cwd=work)
    config = json.loads((work / "data/sae/annealed-16-k3-s0/cfg.json").read_text())
    assert (config["variant"], config["k"]) == ("annealed", 3)
    curves = json.loads((work / "data/sae/manifest.json").read_text())
    assert curves["params"]["variant"] == {"kind": "annealed", "start": 4.0}


LABEL = """
import sys
from pathlib import Path

import pytest
from support.study import make_test_params
from support.tiles import D_SAE, PURE, make_line

from ommatid.label.stage import label

params = make_test_params(
    extract={"hookpoints": ["tiles"], "tokens": "patch", "dtype": "float32"},
    train={"d_sae": D_SAE, "k": 1},
    evaluate={"n_top": 16, "n_per_decile": 2},
    label={"labellers": [{"kind": "colour"}], "min_examples": 4, "n_examples": 8},
)
rows = make_line(Path(sys.argv[1]), params, label=label)["label"].read("labels").to_pylist()
assert {row["latent"]: row["label"] for row in rows if row["latent"] in PURE} == PURE
assert all(row["score"] > 0.9 for row in rows if row["latent"] in PURE)
"""


def test_a_labeller_takes_the_files_of_its_recipe(tree: Tree, tmp_path: Path) -> None:
    section, module = examples_of("add-a-labeller.md")
    union = "Labeller = Annotated[VocabularyLabeller | HumanLabeller | VlmLabeller | "
    declare(tree, "src/ommatid/config/label.py", section, "Labeller = Annotated[", union, "CaptionerLabeller")
    tree.write("src/ommatid/label/labellers/colour.py", module)
    assert_only_named(tree, "add-a-labeller.md")
    tree.run("python", "-c", LABEL, str(tmp_path / "line"))


EXTRACT = """
from pathlib import Path

from ommatid.extract.stage import extract
from support.study import make_artefact, make_test_params
from support.tiles import make_images_artefact

LITE = {"kind": "lite", "variant": "lite0", "image_size": 64}


def extracted(place, images, hookpoint, **values):
    params = make_test_params(extract={"hookpoints": [hookpoint], "judge": LITE, "namer": LITE, "dtype": "float32"} | values)
    return make_artefact(place, "extraction", extract, params.extract, {"images": images})


"""
LOAD = (
    EXTRACT
    + """
import sys

from support.models import SIZES, randomise, save_weights
from transformers import ViTMSNConfig, ViTMSNModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ommatid.vlm.identify import identify

root = Path(sys.argv[1])
model = randomise(ViTMSNModel(ViTMSNConfig(**SIZES, image_size=48, patch_size=16)))
folder = save_weights(root / "msn", model, ViTImageProcessorPil(size={"height": 48, "width": 48}))
found = identify(str(folder))
assert found.kind == "msn"
images = make_images_artefact(root, 12)
made = extracted(root / "made", images, "vision.blocks.1", model=found.model_dump())
assert made.child("vision.blocks.1", "activations").summary["d_model"] == 32
assert made.child("vision.blocks.1", "activations").rows("train") == 9 * images.summary["n_train"]
"""
)


def test_a_model_family_takes_the_files_of_its_recipe(tree: Tree, tmp_path: Path) -> None:
    section, module = examples_of("add-a-model-family.md")
    union = "LiteModel | ClipModel | SiglipModel | DinoModel | VitModel | LlavaModel | QwenModel | "
    declare(tree, "src/ommatid/config/models.py", section, "class TransformersJudge(Section):", union, "ModuleModel")
    tree.write("src/ommatid/vlm/msn.py", module)
    assert_only_named(tree, "add-a-model-family.md")
    tree.run("python", "-c", LOAD, str(tmp_path / "study"))


RUN = (
    EXTRACT
    + """
import sys

from ommatid.executors import run

params = make_test_params(extract={"executor": {"kind": "threads", "workers": 2}}).extract
assert params.executor.workers_here == 2
done = []
run(params.executor, lambda shard: None, range(5), done.append)
assert sorted(done) == [0, 1, 2, 3, 4]

root = Path(sys.argv[1])
images = make_images_artefact(root, 12)
threads = extracted(root / "threads", images, "blocks.15", model=LITE | {"variant": "lite2"}, executor=params.executor.model_dump())
local = extracted(root / "local", images, "blocks.15", model=LITE | {"variant": "lite2"})
assert threads.digest == local.digest
"""
)


def test_an_executor_takes_the_files_of_its_recipe(tree: Tree, tmp_path: Path) -> None:
    section, module = examples_of("add-an-executor.md")
    union = "Executor = Annotated[LocalExecutor | DaskExecutor | "
    declare(tree, "src/ommatid/config/extract.py", section, "Executor = Annotated[", union, "RayExecutor")
    tree.write("src/ommatid/executors/threads.py", module)
    assert_only_named(tree, "add-an-executor.md")
    tree.run("python", "-c", RUN, str(tmp_path / "study"))
