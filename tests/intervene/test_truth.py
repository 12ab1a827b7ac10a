"""Latents that the model reads are causal for the text of their factor and for no other's, and those that it does not read only read.

The images are drawn figures, the model (`support/figure_model.py`) reads their shapes, colours and textures through noise, an MLP and
readers in superposition, and the latents' factors are known.
"""

from collections.abc import Callable
from pathlib import Path

import jaxtyping
import pytest

from ommatid.config import Params
from ommatid.config.intervene import ListedLatents
from ommatid.intervene import class_attribution
from ommatid.intervene.measure import Measured, measure
from ommatid.intervene.subject import Subject
from ommatid.store import Artefact
from support.figure_model import (
    FACTORS,
    NAMES,
    PLANTED,
    make_figure_labels,
    make_figure_line,
    make_figure_params,
    random_labels,
    use_figure_model,
)

N_RANDOM = 12
"""Number of random latents that are tested for a random text."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("figures")


@pytest.fixture(scope="module")
def params(folder: Path) -> Params:
    return make_figure_params(folder, doses=[0, 0.7], n_images=32, draws=20, max_drift=2.0)


@pytest.fixture(scope="module")
def run(folder: Path, params: Params) -> Callable[..., Measured]:
    """Measures latents with labels, given by latent, and with a random label for each random latent."""
    line: dict[str, Artefact] = make_figure_line(folder, params)

    def run(labels: dict[int, str], latents: range, seed: int) -> Measured:
        line["label"] = make_figure_labels(folder / f"labels-{seed}", params, line, {**random_labels(seed), **labels})
        chosen = ListedLatents(kind="listed", latents=tuple(latents))
        with pytest.MonkeyPatch.context() as patch:
            use_figure_model(patch)
            patch.setattr(class_attribution, "N_EXACT", 1)  # other tests are of attribution
            patch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # other tests check the shapes, which takes most of the time here
            found = measure(params.intervene.model_copy(update={"latents": chosen, "seed": seed}), Subject(line), lambda event: None)
        assert isinstance(found, Measured), found
        assert found.zero_dose == 0 and len(found.effects) == len(latents)
        return found

    return run


@pytest.fixture(scope="module")
def of_own(run: Callable[..., Measured]) -> Measured:
    """Results with each factor's own text as the label."""
    return run(dict(enumerate(NAMES)), range(len(NAMES) + N_RANDOM), 0)


@pytest.fixture(scope="module")
def of_others(run: Callable[..., Measured]) -> list[Measured]:
    """Results of the planted latents with the text of another factor as the label, of a further one for each seed."""
    found = []
    for seed in (1, 2, 3):
        labels = {place: FACTORS[(FACTORS.index(name) + 5 * seed) % len(FACTORS)] for place, name in enumerate(PLANTED)}
        found.append(run(labels, range(len(PLANTED)), seed))
    return found


def test_planted_latents_are_causal_for_the_text_of_their_factor(of_own: Measured) -> None:
    statuses = [row["status"] for row in of_own.effects[: len(PLANTED)]]
    assert len(statuses) >= 10 and statuses.count("causal") >= 0.9 * len(statuses), statuses


def test_planted_latents_are_not_causal_for_the_texts_of_other_factors(of_others: list[Measured]) -> None:
    """Texts overlap, so a latent that writes one moves images toward others as well, and further than random latents do."""
    causal = [row["latent"] for found in of_others for row in found.effects if row["status"] == "causal"]
    assert len(causal) <= 0.05 * sum(len(found.effects) for found in of_others), causal


def test_latents_of_factors_that_the_model_does_not_read_only_read(of_own: Measured) -> None:
    """Among them are some that fire with a factor that the model reads, even just where a planted latent fires."""
    statuses = {row["status"] for row in of_own.effects if len(PLANTED) <= row["latent"] < len(NAMES)}
    assert statuses == {"reads_only"}


def test_at_most_one_random_latent_in_twenty_is_causal(of_own: Measured, of_others: list[Measured]) -> None:
    """Those that match a tested latent, over four seeds, and some with a label of their own: 1 of 81 when this was written."""
    statuses = [row["control_causal"] for found in (of_own, *of_others) for row in found.effects]
    statuses += [row["status"] for row in of_own.effects if row["latent"] >= len(NAMES)]
    assert len(statuses) > 80 and statuses.count("causal") <= 0.05 * len(statuses), statuses
