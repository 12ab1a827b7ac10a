"""Proves that near misses are the images that come nearest to firing a latent, by the definition of each kind of SAE.

Activations and weights are small multiples of powers of two, so that arithmetic is exact and many margins are equal.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ommatid.evaluate import batches
from ommatid.sae.model import SAE, Activation, SAEConfig
from support.world import ALWAYS, D_MODEL, D_SAE, DEAD, DOG, DOG_AGAIN, KINDS, PATHS, make_inputs, make_world, run

N_IMAGES, K = 40, 3


def draw(seed: int, *shape: int, least: int = -3) -> Tensor:
    return torch.randint(least, 4, shape, generator=torch.Generator().manual_seed(seed)) / 4


def make_sae(activation: Activation, threshold: Tensor, **gate: Tensor) -> SAE:
    config = SAEConfig("drawn", D_MODEL, D_SAE, K, "world", "world", activation)
    b_enc = draw(1, D_SAE)
    b_enc[0], b_enc[1] = -100.0, -1.0
    return SAE(config, draw(2, D_MODEL, D_SAE), b_enc, draw(3, D_SAE, D_MODEL), draw(4, D_MODEL), threshold, **gate)


SCALE, SHIFT = 2.0 ** torch.arange(D_SAE).remainder(3).sub(1), draw(5, D_SAE)
EACH = draw(6, D_SAE, least=0)
SAES: dict[str, tuple[SAE, Callable[[list[float], int], float]]] = {
    # the SAE, and what the pre-activation of a latent must exceed on a token with these pre-activations
    "one threshold": (make_sae("threshold", torch.tensor(1.25)), lambda pre, latent: 1.25),
    "a threshold for each latent": (make_sae("threshold", EACH), lambda pre, latent: float(EACH[latent])),
    "relu": (make_sae("threshold", torch.tensor(0.0)), lambda pre, latent: 0.0),
    "topk": (make_sae("topk", torch.tensor(0.0)), lambda pre, latent: max(0.0, sorted(pre)[-K])),
    "gated": (
        make_sae("gated", torch.tensor(0.0), gate_scale=SCALE, gate_shift=SHIFT),
        lambda pre, latent: max(0.0, -float(SHIFT[latent] / SCALE[latent])),
    ),
}


def by_definition(
    x: Tensor, sae: SAE, needed: Callable[[list[float], int], float], latent: int, silent: list[int], tokens: range
) -> list[tuple[float, int]]:
    """The margins and images of a latent's near misses, computed one token at a time."""
    pre_acts = (x.double() @ sae.W_enc.double() + sae.b_enc.double()).tolist()
    margins = [(max(pre_acts[i][t][latent] - needed(pre_acts[i][t], latent) for t in tokens), i) for i in silent]
    return sorted(margins, key=lambda pair: (-pair[0], pair[1]))[:8]


@pytest.mark.parametrize("kind", SAES)
@pytest.mark.parametrize("how", ["max", "mean", "cls"])
def test_near_misses_equal_their_definition(kind: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard is read in several batches."""
    monkeypatch.setattr(batches, "ENTRIES", 7 * len(KINDS) * D_SAE)
    sae, needed = SAES[kind]
    x = draw(7, N_IMAGES, len(KINDS), D_MODEL)
    x[20:25] = x[5:10]  # ties over shards
    evaluation = run(tmp_path / "evaluation", make_inputs(tmp_path, x, ["a"] * N_IMAGES, ["a"] * N_IMAGES, sae), image_activation=how)
    fires = {(row["latent"], row["image"]) for row in evaluation.read("firings").to_pylist()}
    rows = evaluation.read("near_misses").to_pylist()
    tokens, n_tied = range(1) if how == "cls" else range(len(KINDS)), 0
    for row in evaluation.read("latents").to_pylist():
        latent = row["latent"]
        found = [(row["rank"], row["margin"], row["image"]) for row in rows if row["latent"] == latent]
        silent = [] if row["is_dead"] else [image for image in range(N_IMAGES) if (latent, image) not in fires]
        expected = by_definition(x, sae, needed, latent, silent, tokens)
        assert found == [(rank, margin, image) for rank, (margin, image) in enumerate(expected, start=1)]
        n_tied += len(expected) - len({margin for margin, _ in expected})
    assert n_tied > 10
    for row in rows:
        least = 0.0 if kind == "topk" else needed([], row["latent"])
        assert row["closeness"] == (None if least == 0 else pytest.approx((row["margin"] + least) / least, abs=1e-6))


def test_images_just_below_the_threshold_are_found(tmp_path: Path) -> None:
    """Dogs' direction is added to two cars at 0.9 and 0.8 of the threshold, which is 0.5, on one patch."""
    x, labels = make_world(60)
    cars = [image for image, label in enumerate(labels) if label == "car"]
    for share, image in ((0.8, cars[1]), (0.9, cars[5])):
        x[image, 2, DOG] = share * 0.5
    evaluation = run(tmp_path / "evaluation", make_inputs(tmp_path, x, labels, ["/".join(PATHS[label]) for label in labels]))
    rows = evaluation.read("near_misses").to_pylist()
    nearest = [(row["image"], row["closeness"], row["margin"]) for row in rows if row["latent"] == DOG][:3]
    assert [image for image, _, _ in nearest][:2] == [cars[5], cars[1]]
    assert nearest[0][1:] == (pytest.approx(0.9, abs=1e-3), pytest.approx(-0.05, abs=1e-3))
    assert nearest[1][1] == pytest.approx(0.8, abs=1e-3) and nearest[2][1] < 0.3
    found = {row["latent"] for row in rows}
    assert DOG_AGAIN in found and not {DEAD, ALWAYS} & found  # a latent that fires everywhere misses nothing


def test_margins_of_what_fires_are_not_negative() -> None:
    for name, (sae, _) in SAES.items():
        acts, margins = sae.encode_with_margins(draw(8, 200, D_MODEL))
        assert torch.equal(acts, sae.encode(draw(8, 200, D_MODEL))), name
        assert float(margins[acts > 0].min()) >= 0 >= float(margins[acts == 0].max()), name
        assert math.isclose(float(margins[acts > 0].min()), 0.0) == (name == "topk")  # the smallest of the k is what others must exceed
