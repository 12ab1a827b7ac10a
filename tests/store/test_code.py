"""Proves that the code of an artefact is what its numbers come from: no more under the present params, and nothing less."""

import ast
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import ommatid
from ommatid.config import STAGE_NAMES, load_params
from ommatid.sources.stage import code_of
from ommatid.store import code
from ommatid.store.code import NO_NUMBERS, Code, analyse
from support.study import CHECKOUT

PACKAGE = Path(ommatid.__file__).parent
FILES = "extract={source: files, path: x.npy, name: there, model: theirs}"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the package, to be changed."""
    shutil.copytree(PACKAGE, tmp_path / "ommatid", ignore=shutil.ignore_patterns("__pycache__", "explorer", "show"))
    return tmp_path / "ommatid"


def digests(root: Path, *overrides: str) -> dict[str, dict[str, str]]:
    params, now = load_params(CHECKOUT / "params.yaml", overrides), Code(root)
    return {stage: code_of(stage, params, now) for stage in STAGE_NAMES}


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def stale(root: Path, change: Callable[[], object], *overrides: str) -> dict[str, list[str]]:
    """Return the files that differ after a change, of each stage that has such files."""
    before = digests(root, *overrides)
    change()
    after = digests(root, *overrides)
    differing = {name: sorted(dict(before[name].items() ^ after[name].items())) for name in STAGE_NAMES}
    return {name: files for name, files in differing.items() if files}


def test_a_comment_a_docstring_and_formatting_make_nothing_stale(package: Path) -> None:
    def change() -> None:
        for path in package.rglob("*.py"):  # written anew from the syntax tree: other quotes, lines and brackets, and no comment
            tree = ast.parse(path.read_text(encoding="utf-8"))
            if ast.get_docstring(tree) is not None:
                tree.body[0] = ast.Expr(ast.Constant("Something else."))
            path.write_text("# a comment\n" + ast.unparse(tree), encoding="utf-8")

    assert stale(package, change) == {}


def test_a_number_makes_those_stages_stale_that_use_its_module(package: Path) -> None:
    def change() -> None:
        edit(package / "vlm/lite.py", "D_HEAD = 1280", "D_HEAD = 1281")

    assert set(stale(package, change)) == {"extract", "evaluate", "label", "intervene"}
    assert digests(package)["extract"]["vlm/lite.py"] != digests(PACKAGE)["extract"]["vlm/lite.py"]


@pytest.mark.parametrize(
    ("kind", "file"),
    [("clip", "vlm/clip.py"), ("llava", "vlm/llava.py"), ("transformers", "vlm/transformers.py"), ("topk", "sae/variants/topk.py")],
)
def test_a_number_in_the_module_of_another_kind_makes_nothing_stale(package: Path, kind: str, file: str) -> None:
    assert stale(package, lambda: edit(package / file, "\n\n\n", "\n\n\nTUNED = 3\n")) == {}
    chosen = {
        "clip": "extract.model={kind: clip}",
        "llava": "extract.model={kind: llava}",
        "transformers": "extract.judge={kind: transformers, path: x}",
        "topk": "train.grid={variant: [batch_topk, topk]}",
    }[kind]
    changed = stale(package, lambda: edit(package / file, "TUNED = 3", "TUNED = 4"), chosen)
    assert ("train" if kind == "topk" else "extract") in changed and all(files == [file] for files in changed.values())


def test_a_new_variant_labeller_source_or_family_makes_nothing_stale(package: Path) -> None:
    def change() -> None:
        for file in ("sae/variants/new.py", "label/labellers/new.py", "images/new.py", "vlm/new.py"):
            (package / file).write_text("LR = 1\n")

    assert stale(package, change) == {}


@pytest.mark.parametrize(
    ("override", "stage", "file"),
    [
        ("train.k=8", "train", "sae/interop/saelens.py"),
        ("train.k=8", "intervene", "vlm/speaking.py"),
        ("train.k=8", "evaluate", "sae/nmf.py"),
        ("train.k=8", "extract", "extract/from_files/parquet.py"),
        (FILES, "extract", "extract/shard.py"),
        (FILES, "extract", "vlm/lite.py"),
        ("images.source={kind: folder, path: photos}", "images", "images/cifar10.py"),
        ("label.labellers=[{kind: vlm, model: x}]", "label", "label/labellers/captioner.py"),
    ],
)
def test_what_the_params_do_not_use_does_not_count(override: str, stage: str, file: str) -> None:
    assert file not in digests(PACKAGE, override)[stage]


@pytest.mark.parametrize(
    ("override", "stage", "file"),
    [
        ("train.variant={kind: imported, path: x}", "train", "sae/interop/saelens.py"),
        ("evaluate.baselines=[nmf]", "evaluate", "sae/nmf.py"),
        (FILES, "extract", "extract/from_files/parquet.py"),
        ("images.source={kind: folder, path: photos}", "images", "images/folder.py"),
        ("images.source={kind: shapes, path: x.json}", "images", "images/shapes.py"),
        ("label.labellers=[{kind: vlm, model: x}]", "label", "label/prompts/name.md"),
        ("train.runs=[{k: 8}, {variant: {kind: archetypal}}]", "train", "sae/variants/archetypal.py"),
        ("train.runs=[{k: 8}, {variant: {kind: archetypal}}]", "train", "sae/kmeans.py"),
        ("train.k=8", "catalog", "catalog/sql/features.sql"),
        ("train.k=8", "label", "vlm/imagenet_classes.txt"),
        ("train.k=8", "label", "label/words/common.txt"),
    ],
)
def test_what_the_params_use_counts(override: str, stage: str, file: str) -> None:
    assert file in digests(PACKAGE, override)[stage]


def test_data_files_count_by_their_content(package: Path) -> None:
    assert stale(package, lambda: edit(package / "catalog/sql/features.sql", "--", "-- ")) == {"catalog": ["catalog/sql/features.sql"]}
    words = package / "label/words/common.txt"
    assert stale(package, lambda: words.write_text(words.read_text() + "heron\n")) == {"label": ["label/words/common.txt"]}


def test_whatever_stages_load_by_name_is_followed() -> None:
    """A stage that loaded code or data in a way that `analyse` does not know would not run again when these change."""
    every_kind = sorted({path.stem for path in PACKAGE.rglob("*.py")})
    used = [file for stage in STAGE_NAMES for file in Code().used_by(f"ommatid.{stage}.stage", kinds=every_kind) if file.endswith(".py")]
    unknown: list[str] = []
    for file in set(used):
        text = (PACKAGE / file).read_bytes()
        found, nodes = analyse(text), list(ast.walk(ast.parse(text)))
        imported = {alias.name for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for alias in n.names}
        names = [n.id if isinstance(n, ast.Name) else n.attr for n in nodes if isinstance(n, ast.Name | ast.Attribute)]
        loads = (
            names.count("import_module") + ("load" in imported) * names.count("load") + ("runpy" in imported) + names.count("__import__")
        )
        reads = names.count("files") if imported & {"files", "resources"} else 0
        if loads > len(found.rooms) or bool(reads) != bool(found.data) or "__file__" in names:
            unknown.append(file)
    # images from a user's module; the place of a library; the version of the code in a draft's name, and of what was remembered
    assert sorted(unknown) == ["store/code.py", "store/draft.py", "vlm/minilm.py", "vlm/user_code.py"]


def test_the_modules_left_out_are_those_that_compute_nothing() -> None:
    assert all(NO_NUMBERS.fullmatch(name) for name in ("ommatid.config.models", "ommatid.executors.dask", "ommatid.tracking"))
    assert not any(NO_NUMBERS.fullmatch(name) for name in ("ommatid.extract.stage", "ommatid.store.draft", "ommatid.schemas"))


def test_the_code_of_a_family_is_its_own(package: Path) -> None:
    kinds = ("lite", "clip", "siglip", "dino", "transformers")

    def used() -> dict[str, dict[str, str]]:
        return {kind: Code(package).used_by(f"ommatid.vlm.{kind}", kinds=(kind,)) for kind in kinds}

    before = used()
    edit(package / "vlm/clip.py", "\n\n\n", "\n\n\nTUNED = 3\n")
    assert [kind for kind, now in used().items() if now != before[kind]] == ["clip"]
    edit(package / "vlm/tower.py", "\n\n\n", "\n\n\nTUNED = 3\n")
    assert used()["lite"] == before["lite"] and used()["siglip"] != before["siglip"]


def test_the_analysis_is_cached_by_content(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = digests(package)
    monkeypatch.setattr(code, "analyse", lambda text: pytest.fail("was read before"))
    began = time.monotonic()
    assert digests(package) == first
    assert time.monotonic() - began < 60  # takes 0.03 s
    monkeypatch.setenv("OMMATID_CACHE", "/proc/nowhere")  # cannot be written
    monkeypatch.undo()
    assert digests(package) == first


@pytest.mark.parametrize("garbage", ["", "{", '{"a": 1}', '{"a": {"digest": "x"}}', "[]"])
def test_a_damaged_cache_is_replaced(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, garbage: str) -> None:
    monkeypatch.setenv("OMMATID_CACHE", str(tmp_path / "cache"))
    first = digests(package)["images"]
    (cache,) = (tmp_path / "cache/code").iterdir()
    cache.write_text(garbage)
    assert digests(package)["images"] == first
    assert len(cache.read_text()) > 100
