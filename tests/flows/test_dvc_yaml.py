"""A change of code reruns the right stages: the dependencies of a stage are exactly the modules that compute its numbers."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from ommatid.config import ExtractParams, TrainParams
from ommatid.pipeline import STAGES
from ommatid.sources.stage import PLACE
from ommatid.sources.stage import STAGES as SOURCE_STAGES
from ommatid.stage import HEALTH, QUALITY, REPORT

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "src/ommatid"
ENTRIES = {stage: f"ommatid.{stage}.stage" for stage in STAGES}
BY_NAME = {"ommatid.extract.stage": "ommatid.extract.from_files.stage", "ommatid.label.stage": "ommatid.label.labellers.human"}
"""Modules that a stage imports by a name that it puts together, where nothing else that it imports needs the same folders."""
NO_NUMBERS = re.compile(r"ommatid(\.(config|errors|events|executors|stage|summaries|tracking)(\..*)?)?")
"""Modules that cannot change what a stage computes from the same params, nor can what they import: executors only say where it is
computed, and tracking where an SAE came from."""
PER_SAE = [name for name, stage in STAGES.items() if stage.is_per_sae]
STAGE_FILE = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
SOURCES = {f"{PLACE}/{stage}.json" for stage in SOURCE_STAGES}


def file_of(module: str) -> Path | None:
    path = REPOSITORY / "src" / module.replace(".", "/")
    return next((p for p in (path / "__init__.py", path.with_suffix(".py")) if p.exists()), None)


def imported_by(module: str) -> set[str]:
    """Return the modules of Ommatid that a module imports, anywhere in it."""
    path = file_of(module)
    assert path, module
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) + 1 - node.level], *filter(None, [node.module])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name.startswith("ommatid") and file_of(name)} or {base}
    return {name for name in found if name.split(".")[0] == "ommatid"}


def needed_by(module: str) -> set[str]:
    seen: set[str] = set()
    queue = [module, module.rpartition(".")[0], *([BY_NAME[module]] if module in BY_NAME else [])]
    while queue:
        name = queue.pop()
        if name not in seen and not NO_NUMBERS.fullmatch(name):
            seen.add(name)
            queue += imported_by(name)
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_the_dependencies_of_a_stage_are_exactly_the_modules_it_uses(stage: str) -> None:
    deps = [REPOSITORY / dep for dep in STAGE_FILE[stage]["deps"] if dep.startswith("src/")]
    assert all(dep.exists() for dep in deps)
    files = {path for name in needed_by(ENTRIES[stage]) if (path := file_of(name))}
    uncovered = {str(f.relative_to(REPOSITORY)) for f in files if not any(f == dep or dep in f.parents for dep in deps)}
    assert uncovered == set()
    unused = {str(d.relative_to(REPOSITORY)) for d in deps if not any(f == d or d in f.parents for f in files) and d.name != "sql"}
    assert unused == set()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_in_dvc_runs_its_verb_with_its_params_inputs_and_report(stage: str) -> None:
    entry = STAGE_FILE[stage]
    assert entry["cmd"] == f"ommatid {stage}{' --allow-rejected' if stage in PER_SAE else ''}"
    section = {"extract": ExtractParams, "train": TrainParams}.get(stage)
    keys = [stage]
    if section and section.runtime_keys:  # keys that params.yaml may leave out reach DVC through data/sources
        needed = {key for key, field in section.model_fields.items() if field.is_required()}
        keys = sorted(f"{stage}.{key}" for key in needed - section.runtime_keys)
    assert sorted(entry["params"]) == keys
    inputs = {str(STAGES[other].place) for other in STAGES[stage].inputs}
    assert {dep for dep in entry["deps"] if dep.startswith("data/")} == inputs | ({f"{PLACE}/{stage}.json"} & SOURCES)
    pictures = [f"{QUALITY / HEALTH}"] if stage == "train" else []
    found = [f"{QUALITY / REPORT}"] if stage == "catalog" else []
    assert entry["outs"] == [str(STAGES[stage].place), f"{QUALITY}/{stage}.html", *pictures, *found]
    assert entry["metrics"] == [f"{QUALITY}/{stage}.json"]


def test_sources_named_by_path_are_checked_in_every_run() -> None:
    entry = STAGE_FILE["sources"]
    assert entry["cmd"] == "ommatid sources" and entry["always_changed"] and not entry.keys() & {"deps", "params"}
    assert entry["outs"] == [{path: {"persist": True}} for path in (f"{PLACE}/{stage}.json" for stage in SOURCE_STAGES)]
