"""Rates by patch are those of a loop, and planted: to remove a latent of a shape changes what the patches of that shape are taken for.

The masks of drawn figures are known, and so is what the model of them reads.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ommatid.config import Params
from ommatid.config.intervene import ListedLatents
from ommatid.errors import InputError
from ommatid.events import Event, Warned
from ommatid.images.figure import CELLS, PLACES, SHAPES, make_figure
from ommatid.intervene.edit import Edit
from ommatid.intervene.masks import Masks
from ommatid.intervene.measure import Measured, measure
from ommatid.intervene.patches import PatchHead, fit_patch_head
from ommatid.intervene.study import Study
from ommatid.intervene.subject import Subject
from ommatid.store import Artefact
from ommatid.vlm import Hookpoint
from support.figure_model import (
    D_MODEL,
    GRID,
    PLAN,
    PLANTED,
    FigureModel,
    make_figure_labels,
    make_figure_line,
    make_figure_params,
    use_figure_model,
)

LATENTS = tuple(range(8))
"""Latents of six shapes and two colours."""
N_SHAPES = 6


def write_masks(folder: Path) -> str:
    """Write a mask for each image, with the class of its shape in the cell that the figure is in, which is four patches."""
    folder.mkdir()
    for number in range(PLAN.n_images):
        figure = make_figure(PLAN.seed, number)
        row, col = divmod(PLACES.index(figure.place), CELLS)
        side, mask = PLAN.size // CELLS, np.zeros((PLAN.size, PLAN.size), np.uint8)
        mask[row * side :][:side, col * side :][:, :side] = 1 + SHAPES.index(figure.shape)
        Image.fromarray(mask).save(folder / f"{number:07d}.png")
    (folder / "classes.txt").write_text("\n".join(["background", *SHAPES]))
    return str(folder)


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Params:
    folder = tmp_path_factory.mktemp("figures")
    chosen = {"kind": "listed", "latents": list(LATENTS)}
    return make_figure_params(folder, latents=chosen, doses=[0], n_images=96, draws=3, max_drift=2.0, masks=write_masks(folder / "masks"))


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, params: Params) -> dict[str, Artefact]:
    folder = tmp_path_factory.mktemp("line")
    made = make_figure_line(folder, params)
    made["label"] = make_figure_labels(folder / "labels", params, made, dict(enumerate(PLANTED)))
    return made


@pytest.fixture
def subject(line: dict[str, Artefact], monkeypatch: pytest.MonkeyPatch) -> Subject:
    use_figure_model(monkeypatch)
    return Subject(line)


@pytest.fixture(scope="module")
def measured(line: dict[str, Artefact], params: Params) -> tuple[Measured, list[Event]]:
    events: list[Event] = []
    with pytest.MonkeyPatch.context() as patch:
        use_figure_model(patch)
        found = measure(params.intervene, Subject(line), events.append)
    assert isinstance(found, Measured), found
    return found, events


def fit(subject: Subject, params: Params) -> PatchHead:
    return fit_patch_head(subject, Masks(str(params.intervene.masks), subject.inputs["images"]), LATENTS)


def test_the_head_reads_shapes_and_each_latent_of_a_shape_has_it_as_its_class(subject: Subject, params: Params) -> None:
    head = fit(subject, params)
    assert head.hookpoint == "last" and set(head.classes) == {"background", *SHAPES} and head.accuracy > 0.8
    assert [head.classes[head.targets[latent]] for latent in range(N_SHAPES)] == list(PLANTED[:N_SHAPES])


def test_removing_a_shape_changes_its_patches_and_no_others_while_controls_change_neither(measured: tuple[Measured, list[Event]]) -> None:
    found, events = measured
    assert not [event for event in events if isinstance(event, Warned)] and found.patch_accuracy and found.patch_accuracy > 0.8
    of = {(row["latent"], row["outcome"], row["arm"]): row for row in found.interventions}
    for latent in range(N_SHAPES):
        target, other = (of[latent, f"patch_{name}_rate", "targeted"] for name in ("target", "other"))
        assert target["target"] == PLANTED[latent] and target["value"] > 0.3 and other["value"] < 0.001
        assert of[latent, "patch_specificity", "targeted"]["low"] > 0.1
        for arm in ("random_latent", "random_direction"):
            assert of[latent, "patch_target_rate", arm]["value"] < 0.1 and of[latent, "patch_other_rate", arm]["value"] < 0.001
        assert of[latent, "patch_target_rate", "random_latent"]["n_draws"] == 3
    for latent in LATENTS[N_SHAPES:]:  # colours, which the masks do not know
        assert of[latent, "patch_target_rate", "targeted"]["value"] == 0


def test_rates_are_those_of_a_loop_over_patches(
    measured: tuple[Measured, list[Event]], subject: Subject, params: Params, line: dict[str, Artefact]
) -> None:
    head = fit(subject, params)
    (described,) = subject.describe([0])
    remove = subject.editor([described]).replacement(Edit((0,), "ablate"))
    n_target = n_changed = 0
    table = line["images"].read("images", ["image", "split"]).to_pylist()
    chosen = {row["n_images"] for row in measured[0].interventions if row["outcome"] == "patch_target_rate"}
    images = Study(params.intervene, subject).images
    assert chosen == {len(images)} and {row["image"] for row in table if row["split"] == "eval"} >= set(images)
    for _, pixels in subject.load_pixels(images):
        plain, edited = subject.model.splice(pixels, "first", [lambda tokens: tokens, remove], "last")
        predicted = (head.predict(tokens).flatten().tolist() for tokens in (plain, edited))
        for before, after in zip(*predicted, strict=True):
            n_target += head.classes[before] == PLANTED[0]
            n_changed += head.classes[before] == PLANTED[0] and after != before
    (row,) = (
        row for row in measured[0].interventions if (row["latent"], row["outcome"], row["arm"]) == (0, "patch_target_rate", "targeted")
    )
    assert row["value"] == pytest.approx(n_changed / n_target) and row["low"] < row["value"] <= row["high"] <= 1


def test_masks_of_other_images_give_no_head(subject: Subject, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = Masks(str(params.intervene.masks), subject.inputs["images"])
    load = masks.load

    def shuffled(*arguments: object) -> object:
        found = load(*arguments)  # type: ignore[arg-type]
        order = torch.randperm(len(found.numbers), generator=torch.Generator().manual_seed(0))
        found.classes[:] = found.classes[order].flip(1)
        return found

    monkeypatch.setattr(masks, "load", shuffled)
    with pytest.raises(
        InputError,
        match=r"names \d+% of the patches of each class right in held-out images, where 10% is chance: the masks may be of other images",
    ):
        fit_patch_head(subject, masks, LATENTS)


@pytest.mark.parametrize(
    ("hookpoints", "said"),
    [
        ({"first": Hookpoint(D_MODEL, (), GRID)}, "no hookpoint with patches comes after first, at which latents are edited"),
        (
            {"first": Hookpoint(D_MODEL, (), GRID), "last": Hookpoint(D_MODEL, (), (3, 3))},
            "the SAE encodes 6 x 6 patches of first, but last has 3 x 3 patches",
        ),
    ],
)
def test_without_patches_to_read_other_outcomes_still_run_and_a_warning_says_why(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch, hookpoints: dict[str, Hookpoint], said: str
) -> None:
    use_figure_model(monkeypatch)
    monkeypatch.setattr(FigureModel, "hookpoints", hookpoints)
    events: list[Event] = []
    one = params.intervene.model_copy(update={"latents": ListedLatents(kind="listed", latents=(0,)), "n_images": 24})
    found = measure(one, Subject(line), events.append)
    assert isinstance(found, Measured) and found.patch_accuracy is None and found.interventions
    assert not [row for row in found.interventions if row["outcome"].startswith("patch_")]
    assert [event for event in events if isinstance(event, Warned)] == [Warned(f"planted: no outcomes by patch: {said}")]


def test_few_masks_are_counted_and_are_too_few(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_figure_model(monkeypatch)
    for number in range(3):
        Image.new("L", (PLAN.size, PLAN.size), 1).save(tmp_path / f"{number:07d}.png")
    events: list[Event] = []
    one = params.intervene.model_copy(
        update={"latents": ListedLatents(kind="listed", latents=(0,)), "n_images": 24, "masks": str(tmp_path)}
    )
    assert isinstance(measure(one, Subject(line), events.append), Measured)
    first, second = (event.what for event in events if isinstance(event, Warned))
    assert first == f"397 images have no mask in {tmp_path}"
    said = r"planted: no outcomes by patch: in the masks of \d training images, there must be 8 patches or more of at least two classes"
    assert re.match(said, second)
