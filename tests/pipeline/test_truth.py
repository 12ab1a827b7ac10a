"""Proves that the numbers of the whole pipeline are right where the truth is known: drawn shapes, and activations that mix their factors.

The stages run as a user runs them, with support/planted_vision.py as the model that is explained. Four SAEs are measured: one made by
hand, a latent for each factor and others for random mixtures of two or three factors, and three trained on the same activations: BatchTopK
from two seeds, and a Matryoshka.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ommatid.activations.columns import from_float16
from ommatid.compute.nearest import ALIKE
from ommatid.evaluate.stage import evaluate
from ommatid.events import ignore
from ommatid.extract import networks
from ommatid.extract.stage import extract
from ommatid.images.stage import run as make_images
from ommatid.label import context as label_material
from ommatid.label.stage import label
from ommatid.metrics import auroc, best_matches, chance_cosine
from ommatid.sae.model import SAE, SAEConfig
from ommatid.sae.trainer import Trainer
from ommatid.store import Artefact
from ommatid.train.stage import run as train
from ommatid.vlm import load_model
from support import planted_vision
from support.planted import begin, iter_planted, make_train_params, mmcs
from support.planted_vision import (
    B_DEC,
    D_MODEL,
    DIRECTIONS,
    FACTORS,
    GROUPS,
    HOOKPOINT,
    MODEL,
    PER_PATCH,
    PLAN,
    PlantedJudge,
    PlantedNamer,
    codes,
    tokens,
    truths,
)
from support.study import make_artefact, make_test_params

N_MIXED = 60
NESTED = {"kind": "matryoshka", "prefixes": [0.125, 1.0]}
BY = ("mean", "soft_wpmi")
N_FACTORS = len(FACTORS)
THRESHOLD = 0.5
"""Threshold of the SAE made by hand: noise stays below it, and a factor that is present lies above."""
UNRELATED = (("family", "shape"), ("temperature", "colour"), ("texture",), ("place",), ("background",))
"""Groups of factors that are independent of one another."""


def draw_mixtures() -> list[list[int]]:
    """Sample mixtures of two or three factors of different groups."""
    rng = np.random.default_rng(0)
    mixtures = []
    for _ in range(N_MIXED):
        groups = [rng.choice(UNRELATED[i]) for i in rng.permutation(len(UNRELATED))[: rng.integers(2, 4)]]
        mixtures.append([FACTORS.index(rng.choice(GROUPS[group])) for group in groups])
    return mixtures


MIXTURES = draw_mixtures()


def plant_sae() -> SAE:
    """Make an SAE whose first N_FACTORS latents read one factor each, and the others the sum of the factors of a mixture."""
    read = torch.linalg.pinv(DIRECTIONS)
    W_enc = torch.cat([read, torch.stack([read[:, mixed].sum(1) for mixed in MIXTURES], dim=1)], dim=1)
    mixed = torch.stack([DIRECTIONS[mixed].sum(0) for mixed in MIXTURES])
    W_dec = torch.nn.functional.normalize(torch.cat([DIRECTIONS, mixed]), dim=1)
    config = SAEConfig("planted", D_MODEL, len(W_dec), PER_PATCH, HOOKPOINT, "planted")
    return SAE(config, W_enc.contiguous(), -(B_DEC @ W_enc), W_dec, B_DEC, torch.tensor(THRESHOLD))


@dataclass(frozen=True)
class Measured:
    """The tables of one SAE."""

    sae: SAE
    latents: list[dict[str, Any]]
    labels: list[dict[str, Any]]
    """Labels by the mean of images."""
    labels_by_wpmi: list[dict[str, Any]]
    comparisons: dict[str, dict[str, Any]]
    """Rows of `comparisons`, by dictionary."""
    levels: list[dict[str, Any]]


@dataclass(frozen=True)
class Line:
    """What the stages made of each SAE."""

    images: Artefact
    activations: Artefact
    by_hand: Measured
    trained: Measured
    again: Measured
    """BatchTopK from another seed."""
    nested: Measured
    """The Matryoshka."""


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    root = tmp_path_factory.mktemp("truth")
    params = make_params(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "load_model", load)
        patch.setattr(networks, "load_judge", lambda params, dtype, device: PlantedJudge())
        patch.setattr(label_material, "load_model", load)
        made = {"images": make_artefact(root / "images", "images", make_images, params.images, {})}
        extraction = make_artefact(root / "extraction", "extraction", extract, params.extract, made)
        made["extract"] = extraction.child(HOOKPOINT, "activations")
        saes = make_artefact(root / "training", "training", train, params.train, made).each()
        measured = [measure(root / name, params, {**made, "train": saes[name]}) for name in params.train.each()]
        yield Line(made["images"], made["extract"], *measured)


def make_params(root: Path) -> Any:
    (root / "plan.json").write_text(PLAN.model_dump_json())
    (root / "factors.txt").write_text("\n".join(FACTORS))
    (root / "planted").mkdir()
    plant_sae().save(root / "planted/sae.safetensors", root / "planted/cfg.json")
    return make_test_params(
        images={"source": {"kind": "shapes", "path": str(root / "plan.json")}, "limit": None, "eval_share": 0.5},
        extract={"model": MODEL, "hookpoints": [HOOKPOINT], "tokens": "patch", "dtype": "float32", "namer": {"kind": "lite"}},
        train={"d_sae": 96, "k": PER_PATCH, "epochs": 60, "batch_size": 256, "lr": 3e-3}
        | {"runs": [{"variant": {"kind": "imported", "path": str(root / "planted")}}, {}, {"seed": 1}, {"variant": NESTED}]},
        label={"labellers": [{"kind": "vocabulary", "words": [str(root / "factors.txt"), "common"], "by": by} for by in BY]},
    )


def load(params: Any, dtype: Any, device: str) -> Any:
    """Load the module like any other, and in place of `lite` the namer that knows the factors."""
    return PlantedNamer() if params.kind == "lite" else load_model(params, dtype, device)


def measure(root: Path, params: Any, inputs: Mapping[str, Artefact]) -> Measured:
    evaluation = make_artefact(root / "evaluation", "evaluation", evaluate, params.evaluate, inputs)
    labels = make_artefact(root / "labels", "labels", label, params.label, {**inputs, "evaluate": evaluation})
    rows = labels.read("labels").sort_by([("labeller", "ascending"), ("latent", "ascending")]).to_pylist()
    d_sae = len(rows) // len(BY)
    return Measured(
        SAE.load(inputs["train"].path),
        evaluation.read("latents").to_pylist(),
        rows[:d_sae],
        rows[d_sae:],
        {row["dictionary"]: row for row in evaluation.read("comparisons").to_pylist()},
        evaluation.read("levels").to_pylist(),
    )


def eval_numbers(line: Line) -> Tensor:
    """Return the numbers of the evaluation images in the plan."""
    rows = line.images.read("images", ["path", "split"]).to_pylist()
    return torch.tensor([int(row["path"].removesuffix(".png")) for row in rows if row["split"] == "eval"])


# ---- the model is what it says


def test_activations_are_the_mixture_that_was_planted(line: Line) -> None:
    paths = line.images.read("images", ["path"])["path"].to_pylist()
    rows = line.activations.read("eval")
    numbers = [int(paths[image].removesuffix(".png")) for image in rows["image"].to_pylist()]
    found = from_float16(rows["x"]).float()
    torch.testing.assert_close(found, tokens()[numbers, rows["token"].to_pylist()], rtol=1e-3, atol=1e-3)
    rest = found - B_DEC - codes()[numbers, rows["token"].to_pylist()] @ DIRECTIONS
    assert float(rest.std()) == pytest.approx(planted_vision.NOISE, rel=0.05)


def test_each_image_has_seven_factors_and_each_of_its_patches_three() -> None:
    assert set(truths().sum(1).tolist()) == {7}
    assert set((codes() > 0).sum(2).flatten().tolist()) == {3}
    assert torch.equal((codes() > 0).any(1), truths().bool())


# ---- evaluate


def test_a_latent_of_one_factor_fires_on_the_images_that_have_it(line: Line) -> None:
    expected = truths()[eval_numbers(line)].sum(0).tolist()
    assert [row["n_images"] for row in line.by_hand.latents[:N_FACTORS]] == expected


def test_monosemanticity_ranks_single_factors_above_mixtures(line: Line) -> None:
    ms = torch.tensor([row["ms"] for row in line.by_hand.latents])
    area, low, _ = auroc(ms[:N_FACTORS], ms[N_FACTORS:])
    assert area > 0.97
    assert low > 0.94
    for mixed, of_mixture in zip(MIXTURES, ms[N_FACTORS:].tolist(), strict=True):
        assert of_mixture < float(ms[mixed].mean())


def test_purity_is_1_for_shapes_and_at_chance_for_independent_factors(line: Line) -> None:
    purity = {name: line.by_hand.latents[i]["purity"] for i, name in enumerate(FACTORS)}
    assert {purity[shape] for shape in GROUPS["shape"]} == {1.0}
    assert all(0.2 < purity[family] < 0.8 for family in GROUPS["family"])  # three shapes each
    for group in ("colour", "texture", "place", "background"):
        assert np.mean([purity[name] for name in GROUPS[group]]) < 0.35  # the commonest of nine among 16


def test_depth_in_the_taxonomy_is_that_of_the_factor(line: Line) -> None:
    depth = {name: line.by_hand.latents[i]["lca_depth"] for i, name in enumerate(FACTORS)}
    assert {depth[shape] for shape in GROUPS["shape"]} == {2}
    assert {depth[family] for family in GROUPS["family"]} == {1}
    assert {depth[name] for group in ("temperature", "colour", "texture", "place", "background") for name in GROUPS[group]} == {0}


# ---- label


@pytest.mark.parametrize(("by", "share"), [("labels", 0.9), ("labels_by_wpmi", 0.8)])  # soft-WPMI: 31 of 38
def test_nine_in_ten_planted_latents_get_the_right_label_out_of_thousands(by: str, share: float, line: Line) -> None:
    named = [row["label"] for row in getattr(line.by_hand, by)[:N_FACTORS]]
    right = [name == factor for name, factor in zip(named, FACTORS, strict=True)]
    assert sum(right) / N_FACTORS >= share


def test_right_labels_score_high_and_wrong_ones_near_chance(line: Line) -> None:
    rows = [row for row, factor in zip(line.by_hand.labels, FACTORS, strict=False) if row["label"] == factor]
    assert np.mean([row["auroc"] for row in rows]) > 0.9
    assert np.mean([row["score"] for row in rows]) > 0.8
    assert np.mean([row["control_score"] for row in rows]) == pytest.approx(0.5, abs=0.06)
    assert all(row["score"] > row["control_score"] for row in rows)


def test_labels_of_mixtures_score_lower(line: Line) -> None:
    single, mixed = line.by_hand.labels[:N_FACTORS], line.by_hand.labels[N_FACTORS:]
    scores = [torch.tensor([row["score"] for row in rows if row["score"] is not None]) for rows in (single, mixed)]
    assert auroc(*scores)[1] > 0.9


# ---- the whole way: trained on nothing but the activations


def test_a_trained_sae_scores_above_an_untrained_one_and_the_neurons(line: Line) -> None:
    trained, *others = (line.trained.comparisons[name] for name in ("sae", "untrained", "neurons"))
    for other in others:
        assert trained["ms_low"] > other["ms_high"]
        assert trained["ms_floor"] == other["ms_floor"]
    assert trained["fvu"] < 0.1 < line.trained.comparisons["untrained"]["fvu"]


def test_training_finds_the_planted_factors(line: Line) -> None:
    assert mmcs(line.trained.sae.W_dec, DIRECTIONS) > 0.9


def test_most_factors_that_training_finds_are_labelled_right(line: Line) -> None:
    cosines = torch.nn.functional.normalize(line.trained.sae.W_dec, dim=1) @ DIRECTIONS.T
    found = [(int(latent), FACTORS[i]) for i, latent in enumerate(cosines.argmax(0)) if cosines[latent, i] > 0.9]
    assert len(found) > 0.85 * N_FACTORS
    right = [line.trained.labels[latent]["label"] == factor for latent, factor in found]
    assert np.mean(right) > 0.8


def test_the_second_level_of_a_matryoshka_goes_deeper_in_the_taxonomy(line: Line) -> None:
    first, last = line.nested.levels
    assert last["lca_depth"] > first["lca_depth"] + 0.1


def test_planted_directions_are_found_again_from_another_seed(line: Line) -> None:
    planted = best_matches(DIRECTIONS, line.trained.sae.W_dec)[0]
    found = planted.other[planted.cosine > ALIKE]
    again = best_matches(line.trained.sae.W_dec, line.again.sae.W_dec)[0]
    assert float((again.cosine[found] > ALIKE).double().mean()) > 0.9


def test_directions_of_noise_are_not_found_again() -> None:
    x = torch.randn(4096, D_MODEL, generator=torch.Generator().manual_seed(0))
    matches = best_matches(*(fit(x, seed) for seed in (0, 1)))[0]
    assert float(matches.cosine.max()) < ALIKE
    assert matches.mmcs == pytest.approx(chance_cosine(96, D_MODEL), abs=0.1)


def fit(x: Tensor, seed: int) -> Tensor:
    """Train an SAE of 96 latents, and return its directions."""
    params = make_train_params(d_sae=96, k=PER_PATCH, epochs=15, batch_size=256, seed=seed)
    learner = begin(params, x)
    Trainer([learner], ignore, None).fit(iter_planted(x, params.batch_size))
    return learner.weights.W_dec
