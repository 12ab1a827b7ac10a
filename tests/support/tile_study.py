"""A finished study of tile pictures whose SAE is planted, made through the stages but without their gates."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from ommatid import store
from ommatid.catalog.stage import CATALOG, build_catalog
from ommatid.config import CatalogParams, Params, TrainParams
from ommatid.pipeline import STAGES
from ommatid.pipeline.inputs import open_inputs
from ommatid.stage import load
from ommatid.store import Artefact, Draft
from support.study import make_test_params
from support.tiles import COLOURS, D_SAE, TileModel, plant_sae, use_tile_model, write_tile_folder

Plant = Callable[[TrainParams, Mapping[str, Artefact], Draft], Any]
SAE = "planted"
N_IMAGES = 200


def make_tile_study(root: Path, plant: Plant = plant_sae, model: TileModel | None = None, **sections: Mapping[str, Any]) -> Path:
    """Make a study in `root/data` of a planted SAE and a model; `sections` change its params. Return its catalogue."""
    write_tile_folder(root / "photos", N_IMAGES)
    (root / "words.txt").write_text("\n".join(COLOURS))
    changes: dict[str, dict[str, Any]] = {
        "images": {"source": {"kind": "folder", "path": str(root / "photos")}, "limit": None},
        "extract": {"hookpoints": ["tiles"], "tokens": "patch", "dtype": "float32"},
        "train": {"d_sae": D_SAE, "k": 1},
        "evaluate": {"baselines": []},
        "label": {"labellers": [{"kind": "vocabulary", "words": [str(root / "words.txt")]}], "min_examples": 2},
    }
    params = make_test_params(**{name: {**changes.get(name, {}), **sections.get(name, {})} for name in {**changes, **sections}})
    return run_planted(root / "data", params, plant, model)


def run_planted(data: Path, params: Params, plant: Plant, model: TileModel | None = None) -> Path:
    """Run all stages with a model, and an SAE that is planted in the place of training. Return the catalogue."""
    with pytest.MonkeyPatch.context() as patch:
        use_tile_model(patch, model)
        for name in STAGES:
            run_stage(name, params, data, plant)
    return data / "catalog" / CATALOG


def run_stage(name: str, params: Params, data: Path, plant: Plant) -> None:
    """Run a stage without its gate and without MLflow, which would say where the SAE comes from."""
    stage, inputs = STAGES[name], open_inputs(name, params, str(data))
    section = getattr(params, name)
    functions: dict[str, Any] = {"train": functools.partial(_plant, plant), "catalog": _catalogue}
    run = functions.get(name) or load(f"ommatid.{name}.stage:run")
    place = data / stage.place.name
    with store.open_draft(place, stage.kind, section.identity(), inputs) as draft:
        run(section, inputs, draft)
        draft.publish(place)


def _plant(plant: Plant, params: TrainParams, inputs: Mapping[str, Artefact], draft: Draft) -> None:
    plant(params, inputs, draft.child(SAE, "sae"))
    draft.seal({"saes": [SAE]})


def _catalogue(params: CatalogParams, inputs: Mapping[str, Artefact], draft: Draft) -> None:
    build_catalog(params, inputs, draft, {SAE: {}})
