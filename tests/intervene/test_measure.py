"""Proves what `measure` says of latents whose effect on the output is known.

The model reads three colours of its tokens. Three latents are detectors of a colour that write it; all others detect a mixture of colours
as well, but write where the model does not read.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from ommatid.config import Params, TrainParams
from ommatid.config.intervene import BestLatents
from ommatid.intervene.measure import Measured, measure
from ommatid.label.stage import label
from ommatid.sae.model import SAE, SAEConfig
from ommatid.store import Artefact, Draft
from ommatid.vlm import Hookpoint
from support.study import make_test_params
from support.tiles import COLOURS, GRID, TileModel, make_line, use_tile_model

D_MODEL = 64
"""Width of the activations, large enough for random directions to be far from the colours'."""
N_READERS = 120
"""Number of latents that the model does not read."""
DRAWS = 20
PLANTED = {0: "red", 1: "green", 2: "blue"}


def plant(params: TrainParams, inputs: Mapping[str, Artefact], draft: Draft) -> Artefact:
    """Make an SAE of which the first three latents write what they read, and the others write where the model does not read."""
    model = TileModel()
    generator = torch.Generator().manual_seed(2)
    mixtures = torch.randn(N_READERS, 3, generator=generator)
    reads = torch.cat([torch.eye(3), mixtures / mixtures.norm(dim=1, keepdim=True)]) @ model.spread
    unread = torch.linalg.qr(torch.cat([model.spread, torch.randn(D_MODEL - 3, D_MODEL, generator=generator)]).T).Q.T[3:]
    written = torch.randn(N_READERS, D_MODEL - 3, generator=generator) @ unread
    writes = torch.cat([model.spread, written / written.norm(dim=1, keepdim=True)])
    n = len(reads)
    config = SAEConfig("planted", model.d_model, n, 1, "tiles", "tiles")
    sae = SAE(config, reads.T.contiguous(), torch.zeros(n), writes, torch.zeros(model.d_model), torch.tensor(0.3))
    with draft.write_file("sae.safetensors") as weights, draft.write_file("cfg.json") as cfg:
        sae.save(weights, cfg)
    return draft.seal({"sae": "planted", "dead_latents": []})


@pytest.fixture(scope="module", autouse=True)
def wide_model() -> Iterator[None]:
    """Make the activations of the tile model wide."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TileModel, "d_model", D_MODEL)
        patch.setattr(TileModel, "hookpoints", {"tiles": Hookpoint(D_MODEL, ("cls",), GRID)})
        yield


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Params:
    words = tmp_path_factory.mktemp("words") / "colours.txt"
    words.write_text("\n".join(COLOURS) + "\n")
    return make_test_params(
        extract={"hookpoints": ["tiles"], "tokens": "patch", "dtype": "float32"},
        train={"d_sae": 3 + N_READERS, "k": 1},
        evaluate={"n_top": 16, "n_per_decile": 2},
        label={"labellers": [{"kind": "vocabulary", "words": [str(words)]}], "min_examples": 4, "n_examples": 8},
        intervene={"latents": {"kind": "listed", "latents": list(range(14))}, "n_images": 32, "draws": DRAWS, "max_drift": 1.0},
    )


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, wide_model: None, params: Params) -> dict[str, Artefact]:
    return make_line(tmp_path_factory.mktemp("line"), params, train=plant, label=label)


def run(line: Mapping[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Measured:
    use_tile_model(monkeypatch)
    found = measure(params.intervene.model_copy(update=changes), line, lambda event: None)
    assert isinstance(found, Measured), found
    return found


def test_latents_that_the_model_reads_are_causal_and_no_others(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(line, params, monkeypatch)
    statuses = {row["latent"]: row["status"] for row in found.effects}
    assert len(statuses) > 8 and {latent for latent, status in statuses.items() if status == "causal"} == set(PLANTED)
    assert set(statuses.values()) == {"causal", "reads_only"}
    assert found.zero_dose == 0 and found.random_causal == 0
    for row in found.effects:
        if row["latent"] in PLANTED:
            assert row["effect_low"] > 0 and row["effect"] > row["best_control"] and 0 <= row["dose"] <= 1
        else:
            assert abs(row["effect"]) < 1e-6


def test_an_effect_that_comes_with_too_much_drift_breaks_the_model(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(line, params, monkeypatch, max_drift=1e-6)
    statuses = {row["latent"]: row["status"] for row in found.effects}
    assert {latent for latent, status in statuses.items() if status == "breaks_model"} == set(PLANTED)
    assert "causal" not in statuses.values()


def test_outcomes_are_those_of_a_loop_over_images(line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    """The red latent at dose 1 moves every image as far as the mean of its tokens moves."""
    found = run(line, params, monkeypatch, doses=(1.0,))
    act = next(row["act"] for row in found.effects if row["latent"] == 0)
    of = {(row["arm"], row["outcome"]): row for row in found.interventions if row["latent"] == 0}
    assert act == pytest.approx(float(of_red(line).quantile(0.99)), rel=1e-5)
    assert of["targeted", "toward_label"]["n_images"] == 32
    assert of["targeted", "toward_label"]["value"] > 0.1 > abs(of["random_latent", "toward_label"]["value"])
    assert of["sign_flipped", "toward_label"]["value"] < 0
    assert of["random_latent", "drift"]["value"] < of["targeted", "drift"]["value"] / 2
    assert of["random_direction", "drift"]["n_draws"] == DRAWS


def of_red(line: Mapping[str, Artefact]) -> torch.Tensor:
    """Positive activations of the red latent on the training tokens."""
    from ommatid.activations.batches import load_sample

    acts = load_sample(line["extract"], 2**17) @ TileModel().spread[0]
    return acts[acts > 0.3]


def test_a_run_is_repeated_exactly(line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"latents": BestLatents(kind="best", by="ms", n=3)}
    one, other = (run(line, params, monkeypatch, **chosen) for _ in range(2))
    assert one == other and len(one.effects) == 3


def test_classes_are_attributed_to_the_latents_that_the_model_reads(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model does not read has no effect; the first latents' effects by gradients have the sign of those by ablation."""
    found = run(line, params, monkeypatch, latents=BestLatents(kind="best", by="ms", n=1))
    assert found.attributions
    of_unread = [row["effect"] for row in found.attributions if row["latent"] not in PLANTED]
    by_class = {row["output"]: row for row in found.attributions if row["rank"] == 1}
    assert all(row["latent"] in PLANTED and row["exact"] * row["effect"] > 0 for row in by_class.values())
    assert max(map(abs, of_unread), default=0) < 1e-4 * max(abs(row["effect"]) for row in by_class.values())
