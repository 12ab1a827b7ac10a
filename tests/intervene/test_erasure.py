"""Proves that a class is erased if the only direction that tells it apart is removed, by a latent or by LEACE, and not by controls."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.nn.functional import normalize

from ommatid.intervene.arms import Controls
from ommatid.intervene.erasure import LEAST_IMAGES, Erasure
from ommatid.intervene.subject import Described

WIDTH = 16
N = 600


def make(n: int = N) -> tuple[Erasure, Controls]:
    """Make images of three classes: ruler, which a latent tells from plain, and other, which another direction tells from both."""
    generator = torch.Generator().manual_seed(0)
    kinds = [("ruler", "plain")[number % 2] if number % 10 else "other" for number in range(n)]
    directions = normalize(torch.eye(WIDTH), dim=1)
    acts = torch.tensor([2.0 if kind == "ruler" else 0.0 for kind in kinds]) * torch.rand(n, generator=generator).add(0.5)
    noise = 0.3 * torch.randn(n, WIDTH, generator=generator)
    others = torch.tensor([3.0 if kind == "other" else 0.0 for kind in kinds])
    subject = SimpleNamespace(classes=dict(enumerate(kinds)), sae=SimpleNamespace(W_dec=directions))
    erasure = Erasure(cast(Any, subject), [0, 5])
    vars(erasure)["_pooled"] = noise + acts[:, None] * directions[0] + others[:, None] * directions[1]
    vars(erasure)["_acts"] = torch.stack([acts, acts], 1)
    random = normalize(torch.randn(4, WIDTH, generator=generator), dim=1)
    return erasure, Controls((0,), torch.tensor([[7], [9], [11], [12]]), random, random[0])


def test_the_class_is_erased_by_its_latent_and_by_leace_and_other_classes_are_spared() -> None:
    erasure, controls = make()
    rows = list(erasure.rows(Described(0, None, 8, 1.0, None, 2.0, "ruler"), controls))
    of = {(row["outcome"], row["arm"]): row["value"] for row in rows}
    assert of["erasure", "none"] > 0.95
    # `other` can still be told from `ruler`, and is a sixth of the rest
    assert 0.4 < of["erasure", "targeted"] < 0.7 and 0.4 < of["erasure", "leace"] < 0.7
    assert min(of["erasure", "random_latent"], of["erasure", "random_direction"], of["erasure", "diff_means"]) > 0.9
    assert of["erasure_others", "targeted"] > 0.7 * of["erasure_others", "none"]


@pytest.mark.parametrize(("n", "of_class"), [(LEAST_IMAGES - 2, "ruler"), (N, "unknown"), (N, None), (60, "other")])
def test_nothing_is_said_from_too_few_images(n: int, of_class: str | None) -> None:
    erasure, controls = make(n)
    assert list(erasure.rows(Described(0, None, 8, 1.0, None, 2.0, of_class), controls)) == []
