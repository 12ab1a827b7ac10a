"""A planted SAE on pictures of coloured tiles, and every artefact up to its evaluation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import TileModel, make_artefact, make_images_artefact

from ommatid.config import Params, TrainParams
from ommatid.evaluate.stage import evaluate
from ommatid.extract import towers
from ommatid.extract.stage import extract
from ommatid.label.evidence import context
from ommatid.sae.model import SAE, SAEConfig
from ommatid.store import Artefact, Draft

N_IMAGES = 300
PURE = {0: "red", 1: "green", 2: "blue"}
MIXED, DEAD, ALWAYS = 3, 4, 5
D_SAE = 6


def plant_sae(params: TrainParams, inputs: Mapping[str, Artefact], draft: Draft) -> Artefact:
    """The train stage's artefact with weights that are known."""
    red, green, blue = TileModel().spread
    directions = torch.stack([red, green, blue, (red + green) / 2**0.5, red, red])
    b_enc = torch.tensor([0.0, 0.0, 0.0, 0.0, -100.0, 5.0])
    config = SAEConfig("planted", TileModel.d_model, D_SAE, 1, "tiles", "tiles")
    sae = SAE(config, directions.T.contiguous(), b_enc, directions, torch.zeros(TileModel.d_model), torch.tensor(0.3))
    with draft.write_file("sae.safetensors") as weights, draft.write_file("cfg.json") as cfg:
        sae.save(weights, cfg)
    return draft.seal({"sae": "planted", "dead_latents": [DEAD]})


def make_line(root: Path, params: Params, **more: Any) -> dict[str, Artefact]:
    """Images, activations, the planted SAE and its evaluation, by stage; and what the stages in `more` make after them."""
    with pytest.MonkeyPatch.context() as patch:
        use_tile_model(patch)
        made: dict[str, Artefact] = {"images": make_images_artefact(root, N_IMAGES)}
        stages: Mapping[str, Any] = {"extract": extract, "train": plant_sae, "evaluate": evaluate, **more}
        kinds = {"extract": "extraction", "train": "sae", "evaluate": "evaluation", "label": "labels"}
        for name, stage in stages.items():
            artefact = make_artefact(root / kinds[name], kinds[name], stage, getattr(params, name), made)
            made[name] = artefact.child("tiles", "activations") if name == "extract" else artefact
        return made


def use_tile_model(patch: pytest.MonkeyPatch) -> None:
    """Whichever model the params name, it is the TileModel."""
    model = TileModel()
    patch.setattr(towers, "load_model", lambda params, dtype, device: model)
    patch.setattr(towers, "load_judge", lambda params, dtype, device: model)
    patch.setattr(context, "load_model", lambda params, dtype, device: model)
