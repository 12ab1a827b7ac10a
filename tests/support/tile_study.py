"""A finished study of tile pictures whose SAE is planted, made through the stages but without their gates."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from ommatid import store
from ommatid.catalog.stage import CATALOG, build_catalog
from ommatid.config import CatalogParams, Params, TrainParams
from ommatid.label.context import read_joint
from ommatid.pipeline import STAGES, open_stage
from ommatid.pipeline.inputs import open_inputs
from ommatid.stage import load
from ommatid.store import Artefact, Draft
from support.study import make_test_params
from support.tiles import COLOURS, D_SAE, plant_sae, use_tile_model, write_tile_folder

SAE = "planted"
N_IMAGES = 200


def make_tile_study(root: Path, **sections: Mapping[str, Any]) -> Path:
    """Make a study in `root/data`; `sections` change its params. Return its catalogue."""
    write_tile_folder(root / "photos", N_IMAGES)
    (root / "words.txt").write_text("\n".join(COLOURS))
    changes: dict[str, dict[str, Any]] = {
        "images": {"source": {"kind": "folder", "path": str(root / "photos")}, "limit": None},
        "extract": {"hookpoints": ["tiles"], "tokens": "patch", "dtype": "float32"},
        "train": {"d_sae": D_SAE, "k": 1},
        "evaluate": {"baselines": []},
        "label": {"labellers": [{"kind": "vocabulary", "words": [str(root / "words.txt")]}], "min_examples": 2},
    }
    params = make_test_params(**{name: {**values, **sections.get(name, {})} for name, values in changes.items()})
    with pytest.MonkeyPatch.context() as patch:
        use_tile_model(patch)
        for name in STAGES:
            _run(name, params, root / "data")
    return root / "data" / "catalog" / CATALOG


def _run(name: str, params: Params, data: Path) -> None:
    """Run a stage without its gate and without MLflow, which would say where the SAE comes from."""
    stage, inputs = STAGES[name], open_inputs(name, params, str(data))
    section = getattr(params, name)
    functions: dict[str, Any] = {"train": _plant, "catalog": _catalogue}
    run = functions.get(name) or load(f"ommatid.{name}.stage:run")
    place = data / stage.place.name
    with store.open_draft(place, stage.kind, section.identity(), inputs) as draft:
        run(section, inputs, draft)
        draft.publish(place)


def _plant(params: TrainParams, inputs: Mapping[str, Artefact], draft: Draft) -> None:
    plant_sae(params, inputs, draft.child(SAE, "sae"))
    draft.seal({"saes": [SAE]})


def _catalogue(params: CatalogParams, inputs: Mapping[str, Artefact], draft: Draft) -> None:
    build_catalog(params, inputs, draft, {SAE: {}})


def open_activations(catalog: Path) -> Artefact:
    """Open the activations of the study that a catalogue belongs to."""
    return open_stage("extract", "tiles", str(catalog.parents[1]))


def write_meanings(catalog: Path) -> None:
    """Write the relation `meanings` as it is defined: the activation-weighted mean joint embedding of the images that fire a latent."""
    with duckdb.connect(catalog) as connection:
        rows = connection.execute("SELECT latent, image, act FROM firings ORDER BY latent").fetchall()
        images = np.unique([image for _, image, _ in rows])
        joint = read_joint(open_activations(catalog), images).numpy()
        connection.execute("CREATE TABLE meanings (sae VARCHAR, latent INTEGER, n_images INTEGER, embedding BLOB)")
        for latent in sorted({latent for latent, _, _ in rows}):
            mine = [(image, act) for of, image, act in rows if of == latent]
            acts = np.array([act for _, act in mine])
            mean = acts @ joint[np.searchsorted(images, [image for image, _ in mine])] / acts.sum()
            connection.execute("INSERT INTO meanings VALUES (?, ?, ?, ?)", [SAE, latent, len(mine), mean.astype("<f2").tobytes()])
