"""Proves that any number of judges embed each image in one pass, and that each judge's scores use the images that it embedded.

Drawn tiles, the model that sees their colours, and two judges: one of colours, and one that fails on the greenest images. What the
stages write is compared with the library call on everything at once.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch

from ommatid import store
from ommatid.activations.batches import load_sample
from ommatid.activations.columns import from_float16, from_float32
from ommatid.config import EvaluateParams, ExtractParams
from ommatid.config.models import LiteModel
from ommatid.errors import ArtefactError, ConfigError, ModelError
from ommatid.evaluate import monosemanticity as judging
from ommatid.evaluate.monosemanticity import JudgeScores, JudgeSummary
from ommatid.evaluate.stage import evaluate
from ommatid.events import Warned
from ommatid.extract import networks
from ommatid.extract.stage import extract
from ommatid.metrics import monosemanticity
from ommatid.sae.model import SAE, SAEConfig, make_untrained
from ommatid.store import Artefact
from support.study import make_artefact, make_test_params
from support.tiles import GRID, TileModel, make_images_artefact

N_IMAGES = 240
N_CHECKED = 8
"""Pictures with which a model is checked before the images."""
D_SAE = 20
COLOURS, SHY = {"kind": "lite", "variant": "lite2"}, {"kind": "transformers", "path": "shy"}


class Shy(TileModel):
    """Judges by the colours of single tiles, and fails on green images, of which a batch may have one or several."""

    name = "shy"
    d_embed = 18
    fails_on = torch.tensor([0.0, 1.0, 0.0])

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        colours = self.colours(pixels).flatten(1)
        greenest = self.colours(pixels).mean((1, 2)) @ self.fails_on > 0.1
        colours[greenest] = torch.nan
        colours[greenest, 0] = torch.inf
        return colours


class Blind(Shy):
    """Embeds all images as zeros, but not the picture with which it is checked at load."""

    name = "blind"

    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        is_plain = pixels.float().diff(dim=2).abs().mean((1, 2, 3)) < 15
        return torch.where(is_plain[:, None], 0, self.colours(pixels).flatten(1))


@pytest.fixture(scope="module", autouse=True)
def model() -> Iterator[TileModel]:
    model, others = TileModel(), {"shy": Shy(), "blind": Blind()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "load_model", lambda params, dtype, device: model)
        patch.setattr(networks, "load_judge", lambda params, dtype, device: model if isinstance(params, LiteModel) else others[params.path])
        patch.setattr(judging, "WAITING", 7 * D_SAE)  # many additions
        yield model


def extract_params(judge: Any, tokens: str = "all") -> ExtractParams:
    values = {"hookpoints": ["tiles"], "tokens": tokens, "dtype": "float32", "judge": judge, "batch_size": 16}
    params = make_test_params(extract=values).extract
    assert isinstance(params, ExtractParams)
    return params


def evaluate_params(image_activation: str = "max") -> EvaluateParams:
    return make_test_params(evaluate={"image_activation": image_activation, "n_top": 16, "n_per_decile": 2}).evaluate


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artefact]:
    """Images, activations of all tokens with both judges, and an SAE of random directions."""
    root = tmp_path_factory.mktemp("judges")
    made = {"images": make_images_artefact(root, N_IMAGES)}
    made["extract"] = make_artefact(root / "extract", "extraction", extract, extract_params([COLOURS, SHY]), made)
    made["extract"] = made["extract"].child("tiles", "activations")
    config = SAEConfig("random", TileModel.d_model, D_SAE, 3, "tiles", "tiles")
    sae = make_untrained(config, load_sample(made["extract"], 1000), seed=0)
    sae.config = config
    with store.open_draft(root / "sae", "sae", {}, made) as draft:
        with draft.write_file("sae.safetensors") as weights, draft.write_file("cfg.json") as cfg:
            sae.save(weights, cfg)
        draft.seal({"sae": "random", "dead_latents": []})
        made["train"] = draft.publish(root / "sae")
    return made


@pytest.fixture(scope="module")
def evaluated(made: dict[str, Artefact], tmp_path_factory: pytest.TempPathFactory) -> tuple[Artefact, list[Warned]]:
    root, heard = tmp_path_factory.mktemp("evaluation"), []
    params = evaluate_params()
    with store.open_draft(root / "evaluation", "evaluation", params.identity(), made) as draft:
        evaluate(params, made, draft, heard.append)
        return draft.publish(root / "evaluation"), [event for event in heard if isinstance(event, Warned)]


def embeddings_of(made: dict[str, Artefact], column: str) -> dict[int, torch.Tensor]:
    rows = made["extract"].read("embeddings")
    return dict(zip(rows["image"].to_pylist(), from_float32(rows[column]), strict=True))


def eval_rows(made: dict[str, Artefact]) -> tuple[torch.Tensor, list[int]]:
    """Activations of the evaluation images, (images, tokens, d_model), and the images."""
    rows = made["extract"].read("eval")
    per_image = made["extract"].summary["tokens_per_image"]
    return from_float16(rows["x"]).float().unflatten(0, (-1, per_image)), rows["image"].to_pylist()[::per_image]


def test_all_judges_embed_in_the_same_pass(made: dict[str, Artefact], model: TileModel) -> None:
    activations = made["extract"]
    assert model.n_captured == N_IMAGES + N_CHECKED + 1  # the probe
    assert activations.read("embeddings").column_names == ["image", "joint", "judge", "judge_1"]
    shy = torch.stack(list(embeddings_of(made, "judge_1").values()))
    failed = shy.isnan().all(1)
    assert 5 < int(failed.sum()) < N_IMAGES / 2
    torch.testing.assert_close(shy[~failed].norm(dim=1), torch.ones(int((~failed).sum())))
    assert activations.summary["judge"] == "tiles"
    assert activations.summary["judges"] == [
        {"judge": "tiles", "d_judge": 3, "failed": 0},
        {"judge": "shy", "d_judge": 18, "failed": int(failed.sum())},
    ]


def test_a_single_judge_gives_the_columns_of_one_judge(made: dict[str, Artefact], tmp_path: Path) -> None:
    for name, judge in (("alone", COLOURS), ("listed", [COLOURS])):
        inputs = {"images": made["images"]}
        one = make_artefact(tmp_path / name, "extraction", extract, extract_params(judge), inputs).child("tiles", "activations")
        assert one.read("embeddings").column_names == ["image", "joint", "judge"]
        assert one.read("embeddings")["judge"].equals(made["extract"].read("embeddings")["judge"])


def test_each_judges_scores_use_the_images_that_it_embedded(made: dict[str, Artefact], evaluated: Any) -> None:
    x, images = eval_rows(made)
    sae = SAE.load(made["train"].path)
    pooled = {"sae": sae.encode(x.flatten(0, 1)).unflatten(0, x.shape[:2]).amax(1), "neurons": x.amax(1)}
    table = evaluated[0].read("judged")
    assert table.num_rows == 2 * (2 * D_SAE + 3 * TileModel.d_model)  # SAE, untrained; neurons, and sparse ones both ways
    for judge, column in (("tiles", "judge"), ("shy", "judge_1")):
        by_image = embeddings_of(made, column)
        e = torch.stack([by_image[image] for image in images])
        has = e.isfinite().all(1)
        cosines = (e[has].double() @ e[has].double().T)[~torch.eye(int(has.sum()), dtype=torch.bool)]
        for dictionary, acts in pooled.items():
            rows = table.filter((pc.field("judge") == judge) & (pc.field("dictionary") == dictionary)).sort_by("latent")
            expected = monosemanticity(acts[has].numpy(), e[has].numpy())
            np.testing.assert_allclose(rows["ms"].to_numpy(), expected, rtol=1e-6)
            assert rows["floor"].to_pylist() == pytest.approx([float(cosines.mean())] * len(rows))
            low, ms, high = (rows[name].to_numpy() for name in ("ms_low", "ms", "ms_high"))
            assert ((low < ms) & (ms < high))[~np.isnan(ms)].all()


def test_the_main_judges_scores_are_in_the_other_tables(evaluated: Any) -> None:
    evaluation = evaluated[0]
    of_main = evaluation.read("judged").filter((pc.field("judge") == "tiles") & (pc.field("dictionary") == "sae")).sort_by("latent")
    latents = evaluation.read("latents")
    for name in ("ms", "ms_low", "ms_high"):
        assert latents[name].to_pylist() == of_main[name].to_pylist()
    row = evaluation.read("comparisons").to_pylist()[0]
    assert (row["judge"], row["ms_floor"]) == ("tiles", of_main["floor"][0].as_py())
    assert row["ms"] == pytest.approx(np.mean(of_main["ms"]))


def test_failures_are_counted_and_reported(made: dict[str, Artefact], evaluated: Any) -> None:
    evaluation, heard = evaluated
    _, images = eval_rows(made)
    failed = sum(bool(embeddings_of(made, "judge_1")[image].isnan().all()) for image in images)
    assert failed > 0
    main, shy = evaluation.summary["judges"]
    assert (main["judge"], main["failed"], main["n_images"]) == ("tiles", 0, len(images))
    assert (shy["judge"], shy["failed"], shy["n_images"]) == ("shy", failed, len(images) - failed)
    assert evaluation.summary["n_images"] == len(images)
    assert [event.what for event in heard] == [
        f"random: the judge shy gave no embedding for {failed} evaluation images; its scores are of the remaining {len(images) - failed}"
    ]


def test_a_judge_that_fails_on_every_image_is_refused(made: dict[str, Artefact], tmp_path: Path) -> None:
    params = extract_params([COLOURS, {"kind": "transformers", "path": "blind"}])
    with pytest.raises(ModelError, match=r"extract.judge: blind gave no embedding .* for any of the 240 images"):
        make_artefact(tmp_path / "extract", "extraction", extract, params, {"images": made["images"]})


def test_a_judge_that_fails_on_every_evaluation_image_is_refused() -> None:
    scores = JudgeScores(D_SAE, [JudgeSummary("good", 2), JudgeSummary("bad", 2)])
    scores.add(torch.rand(9, D_SAE), [torch.rand(9, 2), torch.full((9, 2), torch.nan)])
    with pytest.raises(ArtefactError, match="the judge bad gave no embedding for any of the 9 evaluation images"):
        scores.begin_second_pass()


def test_the_activation_can_be_that_of_the_class_token(made: dict[str, Artefact], tmp_path: Path) -> None:
    x, images = eval_rows(made)
    acts = SAE.load(made["train"].path).encode(x[:, 0])  # the class token comes first
    evaluation = make_artefact(tmp_path / "evaluation", "evaluation", evaluate, evaluate_params("cls"), made)
    found = {(row["image"], row["latent"]): row["act"] for row in evaluation.read("firings").to_pylist()}
    places = (acts > 0).nonzero().tolist()
    assert {(images[i], latent): float(acts[i, latent]) for i, latent in places} == pytest.approx(found)
    by_image = embeddings_of(made, "judge")
    expected = monosemanticity(acts, torch.stack([by_image[image] for image in images]))
    np.testing.assert_allclose(evaluation.read("latents")["ms"].to_numpy(), expected, rtol=1e-6)
    assert evaluation.summary["image_activation"] == "cls"


def test_activations_without_a_class_token_are_refused(made: dict[str, Artefact], tmp_path: Path) -> None:
    inputs = {"images": made["images"]}
    patches = make_artefact(tmp_path / "extract", "extraction", extract, extract_params(COLOURS, "patch"), inputs)
    inputs = made | {"extract": patches.child("tiles", "activations")}
    assert inputs["extract"].summary["tokens_per_image"] == GRID[0] * GRID[1]
    with pytest.raises(
        ConfigError, match=r"evaluate.image_activation: cls needs .* only patch tokens .* at tiles; set it to max or mean .* extract.tokens"
    ):
        make_artefact(tmp_path / "evaluation", "evaluation", evaluate, evaluate_params("cls"), inputs)
