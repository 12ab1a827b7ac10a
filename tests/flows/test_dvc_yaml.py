"""Proves that dvc.yaml runs every stage with its params, inputs and sources, and nothing else."""

from pathlib import Path

import pytest
import yaml

from ommatid.config import ExtractParams, ImagesParams, TrainParams
from ommatid.pipeline import STAGES
from ommatid.sources.stage import PLACE
from ommatid.stage import HEALTH, QUALITY, REPORT

REPOSITORY = Path(__file__).parents[2]
PER_SAE = [name for name, stage in STAGES.items() if stage.is_per_sae]
STAGE_FILE = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_in_dvc_runs_its_verb_with_its_params_inputs_and_report(stage: str) -> None:
    entry = STAGE_FILE[stage]
    assert entry["cmd"] == f"ommatid {stage}{' --allow-rejected' if stage in PER_SAE else ''}"
    section = {"images": ImagesParams, "extract": ExtractParams, "train": TrainParams}.get(stage)
    keys = [stage]
    if section and section.runtime_keys:  # keys that params.yaml may leave out reach DVC through data/sources
        needed = {key for key, field in section.model_fields.items() if field.is_required()}
        keys = sorted(f"{stage}.{key}" for key in needed - section.runtime_keys)
    assert sorted(entry["params"]) == keys
    inputs = {str(STAGES[other].place) for other in STAGES[stage].inputs}
    assert set(entry["deps"]) == inputs | {f"{PLACE}/{stage}.json"}  # which records its code, too
    pictures = [f"{QUALITY / HEALTH}"] if stage == "train" else []
    found = [f"{QUALITY / REPORT}"] if stage == "catalog" else []
    place = str(STAGES[stage].place)
    persistent = {place: {"persist": True}}  # what did not change is copied from the artefact of the last run
    assert entry["outs"] == [persistent if stage == "images" else place, f"{QUALITY}/{stage}.html", *pictures, *found]
    assert entry["metrics"] == [f"{QUALITY}/{stage}.json"]


def test_sources_named_by_path_are_checked_in_every_run() -> None:
    entry = STAGE_FILE["sources"]
    assert entry["cmd"] == "ommatid sources" and entry["always_changed"] and not entry.keys() & {"deps", "params"}
    assert entry["outs"] == [{path: {"persist": True}} for path in (f"{PLACE}/{stage}.json" for stage in STAGES)]
