"""Proves that an SAE of another library is evaluated and labelled like one that was trained here, on planted colours."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ommatid.config import Params, TrainParams
from ommatid.evaluate.stage import evaluate
from ommatid.extract.stage import extract
from ommatid.label.stage import label
from ommatid.sae.interop import Overrides, export_sae, import_sae
from ommatid.sae.model import SAE, Activation, SAEConfig
from ommatid.store import Artefact, Draft
from support.study import make_artefact, make_test_params
from support.tiles import COLOURS, TileModel, make_images_artefact, use_tile_model

PURE = ("red", "green", "blue")
NORMS = torch.tensor([2.0, 0.5, 3.0])
"""Norms of the directions, which in other libraries need not be 1."""


def plant(activation: Activation, threshold: torch.Tensor) -> SAE:
    """Make the weights of an SAE with a latent for each colour."""
    directions = torch.stack(list(TileModel().spread))
    config = SAEConfig("planted", TileModel.d_model, len(PURE), 1, "tiles", "tiles", activation)
    gated = {"gate_scale": torch.ones(3), "gate_shift": torch.full((3,), 0.1)} if activation == "gated" else {}
    b_enc = torch.full((3,), -0.3 if activation == "gated" else 0.0)
    encoder = (directions / NORMS[:, None]).T.contiguous()
    return SAE(config, encoder, b_enc * (1 / NORMS), directions * NORMS[:, None], torch.zeros(TileModel.d_model), threshold, **gated)


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Params:
    words = tmp_path_factory.mktemp("words") / "colours.txt"
    words.write_text("\n".join(COLOURS) + "\n", encoding="utf-8")
    return make_test_params(
        extract={"hookpoints": ["tiles"], "tokens": "patch", "dtype": "float32"},
        train={"d_sae": len(PURE), "k": 1},
        evaluate={"n_top": 16, "n_per_decile": 2},
        label={"labellers": [{"kind": "vocabulary", "words": [str(words)]}], "min_examples": 4, "n_examples": 16},
    )


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, params: Params) -> Iterator[dict[str, Artefact]]:
    """Images and their activations."""
    root = tmp_path_factory.mktemp("line")
    with pytest.MonkeyPatch.context() as patch:
        use_tile_model(patch)
        made = {"images": make_images_artefact(root, 300)}
        made["extract"] = make_artefact(root / "extraction", "extraction", extract, params.extract, made).child("tiles", "activations")
        yield made


@pytest.mark.parametrize(
    ("form", "sae"),
    [
        ("saelens", plant("threshold", 0.3 / NORMS)),
        ("dictionary_learning", plant("gated", torch.tensor(0.0))),
        ("sparsify", plant("topk", torch.tensor(0.0))),
    ],
)
def test_an_imported_sae_is_evaluated_and_labelled(
    form: str, sae: SAE, before: dict[str, Artefact], params: Params, tmp_path: Path
) -> None:
    export_sae(sae, form, tmp_path / "theirs")

    def train(params: TrainParams, inputs: Mapping[str, Artefact], draft: Draft) -> Artefact:
        """Make the artefact of the stage `train` from the files of another library."""
        imported = import_sae(tmp_path / "theirs", Overrides("tiles", "tiles"))
        with draft.write_file("sae.safetensors") as weights, draft.write_file("cfg.json") as cfg:
            imported.save(weights, cfg)
        return draft.seal({"sae": "imported", "dead_latents": []})

    made = dict(before)
    stages: dict[str, tuple[str, Any]] = {"train": ("sae", train), "evaluate": ("evaluation", evaluate), "label": ("labels", label)}
    for name, (kind, stage) in stages.items():
        made[name] = make_artefact(tmp_path / kind, kind, stage, getattr(params, name), made)
    latents = made["evaluate"].read("latents").to_pylist()
    assert [latent["top_classes"][0] for latent in latents] == list(PURE)
    assert [row["label"] for row in made["label"].read("labels").to_pylist()] == list(PURE)
