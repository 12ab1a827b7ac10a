"""Proves what `steer` says of single images: scores under every arm are those of a loop over edits, and warnings appear when they are due.

Of the planted SAE of tests/support/readers.py, three latents write a colour that the model reads, and the others where it does not read.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from ommatid.errors import InputError
from ommatid.intervene.arms import make_arms
from ommatid.intervene.edit import Edit
from ommatid.intervene.steering import Plan, Steered, choose_readout, steer, unexplained
from ommatid.intervene.subject import Subject
from support.readers import make_reader_line, make_reader_params, wide_tile_model
from support.tiles import GRID, draw_tiles, use_tile_model

RED, GREEN = 0, 1
DRAWS = 4
DOSES = (0.0, 1.0)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    root = tmp_path_factory.mktemp("study")
    with wide_tile_model(), pytest.MonkeyPatch.context() as patch:
        use_tile_model(patch)
        yield Subject(make_reader_line(root, make_reader_params(root)))


def pixels(*pictures: Sequence[str]) -> torch.Tensor:
    rng = np.random.default_rng(3)
    return torch.from_numpy(np.stack([np.asarray(draw_tiles(rng, names)) for names in pictures]))


TWO = pixels(["grey"] * 5 + ["red"], ["grey"] * 5 + ["green"])
"""A picture with a red tile at the bottom right, and one with a green tile there."""


def run(subject: Subject, *latents: int, of: torch.Tensor = TWO, **options: Any) -> Steered:
    described = list(subject.describe(latents))
    readout = options.pop("readout", subject.readout)
    return steer(subject, of, described, Plan(**{"doses": DOSES, "draws": DRAWS, **options}), readout)


def test_scores_of_every_arm_are_those_of_a_loop_over_edits(subject: Subject) -> None:
    found = run(subject, RED)
    described = list(subject.describe([RED]))
    editor = subject.editor(described)
    controls = subject.controls(described, 0, DRAWS)
    assert found.names == ("blue", "green", "red") and len(found.arms) == 2 + len(DOSES) * (3 + 2 * DRAWS)
    for image in range(2):
        for dose in DOSES:
            for arm in make_arms(editor, [Edit((RED,), "set", dose)], controls):
                (output,) = subject.model.splice(TWO[image : image + 1], "tiles", [arm.replacement])
                scores, log_p = subject.readout.scores(output)[0], subject.readout.log_probabilities(output)[0]
                assert torch.allclose(found.of(found.scores_abn, arm.name, dose)[arm.draw, image], scores, atol=1e-6)
                assert torch.allclose(found.of(found.log_p_abn, arm.name, dose)[arm.draw, image], log_p, atol=1e-5)


def test_batches_do_not_change_the_result(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = torch.zeros(2, 6, dtype=torch.bool)
    masks[0, 5] = masks[1, :2] = True
    whole = run(subject, RED, tokens=masks)
    monkeypatch.setattr("ommatid.intervene.steering.BATCH", 1)
    apart = run(subject, RED, tokens=masks)
    assert torch.allclose(whole.scores_abn, apart.scores_abn, atol=1e-6) and torch.allclose(whole.fvu_b, apart.fvu_b)
    assert whole.warnings == apart.warnings


def test_images_pass_once_before_the_hookpoint(subject: Subject) -> None:
    counted = subject.model.n_captured  # pyright: ignore[reportAttributeAccessIssue]
    run(subject, RED)
    assert subject.model.n_captured == counted + 2  # pyright: ignore[reportAttributeAccessIssue]


def test_the_planted_latent_moves_its_colour_to_the_top_and_no_control_does(subject: Subject) -> None:
    found = run(subject, RED, of=TWO[1:])
    red = found.names.index("red")
    assert found.of(found.ranks_abn, "none")[0, 0, red] > 1 == found.of(found.ranks_abn, "targeted", 1.0)[0, 0, red]
    for control in ("sign_flipped", "random_latent"):
        assert (found.of(found.ranks_abn, control, 1.0)[:, 0, red] > 1).all(), control
    raised = found.raised(0, 1.0)
    ((name, rise),) = raised["targeted"]
    assert name == "red" and rise > 2 * max(other for _, other in raised["random_latent"])
    assert raised["sign_flipped"][0][0] != "red" and len(raised["random_direction"]) == DRAWS


def test_the_table_has_the_range_of_the_draws_and_ranks_before_and_after(subject: Subject) -> None:
    found = run(subject, RED)
    rows = found.table(["red"])
    assert len(rows) == 2 * (2 + len(DOSES) * 5)
    row = next(row for row in rows if (row["image"], row["arm"], row["dose"]) == (1, "random_direction", 1.0))
    drawn = found.of(found.scores_abn, "random_direction", 1.0)[:, 1, found.names.index("red")]
    assert row["n_draws"] == DRAWS and row["score"] == float(drawn.mean())
    assert (row["score_low"], row["score_high"]) == (float(drawn.min()), float(drawn.max()))
    assert row["score_before"] == float(found.scores_abn[0, 1, found.names.index("red")])
    targeted = next(row for row in rows if (row["image"], row["arm"], row["dose"]) == (1, "targeted", 1.0))
    assert targeted["rank_before"] > 1 == targeted["rank"] and targeted["probability_before"] < targeted["probability"] <= 1
    assert found.top(1, 1) == ["green", "red"] and found.top(1, 3)[0] == "green"
    for row in found.table():
        ranks = found.of(found.ranks_abn, row["arm"], row["dose"])[:, row["image"], found.names.index(row["name"])].sort().values
        assert row["rank"] == int(ranks[(len(ranks) - 1) // 2]) and (row["rank_low"], row["rank_high"]) == (int(ranks[0]), int(ranks[-1]))


def test_names_beyond_every_draw_of_every_control_are_marked_and_those_by_chance_are_counted(subject: Subject) -> None:
    found = run(subject, RED)
    assert not found.beyond(1, 0.0).any()  # a silent latent is not removed
    assert found.chance == 2 / (1 + 2 * DRAWS + 1)
    controls = torch.cat([found.of(found.log_odds_abn, arm, 1.0)[:, 1] for arm in ("sign_flipped", "random_latent", "random_direction")])
    values = found.log_odds_abn.clone()
    at = next(i for i, key in enumerate(found.arms) if (key.name, key.dose) == ("targeted", 1.0))
    for end, is_beyond in (
        (controls.amax(0), False),
        (controls.amax(0) + 1, True),
        (controls.amin(0) - 1, True),
        (controls.mean(0), False),
    ):
        values[at, 1] = end
        odd = dataclasses.replace(found, names=("red",), scores_abn=values, log_p_abn=values)  # of a single name, scores are compared
        assert (odd.beyond(1, 1.0) == is_beyond).all()


def test_the_name_to_follow_is_the_label_or_the_class_and_else_what_the_edit_raises_most(subject: Subject) -> None:
    found = run(subject, RED)
    assert found.follow(0) == ("red", "its label")
    assert dataclasses.replace(found, labels=(None,), top_classes=("green",)).follow(0)[0] == "green"
    name, why = dataclasses.replace(found, labels=("crimson",), top_classes=(None,)).follow(1)
    assert name == "red" and why == "what the strongest dose raises most, chosen after the fact"


def test_doses_are_written_both_ways(subject: Subject) -> None:
    (scale,) = [one.scale for one in subject.describe([RED])]
    relative, absolute = run(subject, RED, doses=[0.5]), run(subject, RED, doses=[0.5 * scale], unit="absolute")
    assert relative.relative_pl.tolist() == [[0.5]] and relative.acts_pl[0, 0] == pytest.approx(0.5 * scale)
    assert torch.allclose(relative.scores_abn, absolute.scores_abn, atol=1e-6)
    assert absolute.relative_pl[0, 0] == pytest.approx(0.5)


def test_a_mask_edits_its_patches_only_and_heat_shows_where_latents_fire(subject: Subject) -> None:
    on, off = (torch.tensor([place == 5 for place in range(6)]) == is_on for is_on in (True, False))
    everywhere, there, elsewhere = (run(subject, RED, of=TWO[:1], doses=[0.0], tokens=tokens) for tokens in ("firing", on, off))
    heat = there.heat(0)
    assert heat is not None and heat.shape == (1, *GRID) and (heat > 0).nonzero().tolist() == [[0, 1, 2]]
    assert torch.equal(everywhere.scores_abn, there.scores_abn)
    assert torch.equal(elsewhere.of(elsewhere.scores_abn, "targeted", 0.0), elsewhere.of(elsewhere.scores_abn, "none"))


def test_one_text_has_no_probability_but_a_score(subject: Subject) -> None:
    found = run(subject, RED, readout=subject.text_readout(["a red thing"]))
    assert torch.equal(found.log_odds_abn, found.scores_abn) and (found.log_p_abn == 0).all()


@pytest.mark.parametrize(
    ("latents", "options", "says"),
    [
        ([RED, GREEN], {}, "2 latents are edited at once, which do not compose"),
        ([RED], {"of": TWO[1:]}, "latent 0 is silent on the image: to remove it there"),
        ([RED], {}, "latent 0 is silent on 1 of 2 images"),
        ([RED], {"doses": [1.0, 9.0]}, r"dose 9 is above what was observed of latent 0, which is 0\.\d+ at most, 1\.\d\d times its 99th"),
        ([RED], {"doses": [5.0], "kind": "add"}, "dose 5 is above what was observed of latent 0"),
        ([RED], {"doses": [9.0], "kind": "scale"}, "dose 9 is above what was observed of latent 0"),
        ([RED], {"doses": [-1.0, 8.0, 9.0]}, "dose -1 is below 0, which latent 0 never is"),
        ([RED], {"doses": [-1.0, 8.0, 9.0]}, "doses 8 and 9 are above what was observed"),
        ([RED], {}, "the SAE's reconstruction of the edited tokens is worse than the mean token on 2 of 2 images: much of what"),
        ([RED], {"texts": ["red", "redder", "green"]}, "'red' and 'redder' are the same to the model"),
    ],
)
def test_a_warning_says_what_makes_a_result_less_sure(subject: Subject, latents: list[int], options: dict, says: str) -> None:
    if texts := options.pop("texts", None):
        options["readout"] = subject.text_readout(texts)
    with pytest.raises(AssertionError, match=says):
        raise AssertionError("\n".join(run(subject, *latents, **options).warnings))


def test_what_is_unexplained_is_of_the_chosen_tokens_and_beside_the_mean_token() -> None:
    x, mean = torch.tensor([[[2.0, 0.0], [0.0, 4.0], [9.0, 9.0]]]), torch.tensor([0.0, 1.0])
    x_hat = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]])
    chosen = torch.tensor([[True, True, False]])
    assert unexplained(x, x_hat, chosen, mean).tolist() == [(1 + 4) / (4 + 1 + 9)]


def test_a_label_that_other_latents_have_as_well_is_warned_of(subject: Subject) -> None:
    same = [latent for latent, row in subject.labels.items() if row["label"] == "red" and latent != RED]
    said = [
        warning for warning in run(subject, RED).warnings if "has the label 'red' as well" in warning or "have the label 'red'" in warning
    ]
    assert len(said) == min(len(same), 1) and all(f"{len(same)} other" in one or f"latent {same[0]} has" in one for one in said)


def test_without_classes_the_output_is_compared_with_the_label_and_those_nearest(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    described = list(subject.describe([RED]))
    assert choose_readout(subject, described).names == ("blue", "green", "red")
    assert choose_readout(subject, described, ["a rose"]).names == ("a rose",)
    monkeypatch.setattr(subject, "classes", {})
    names = choose_readout(subject, described).names
    assert names[0] == "red" and set(names) <= {row["label"] for row in subject.labels.values()} and len(set(names)) == len(names) > 1
    with pytest.raises(InputError, match="the images have no classes and the latents no label"):
        choose_readout(subject, [dataclasses.replace(described[0], label=None)])


def test_there_are_no_warnings_without_a_reason(subject: Subject) -> None:
    red = pixels(["grey"] * 5 + ["red"])
    words = " ".join(run(subject, RED, of=red, doses=[0.5, 1.0], tokens=torch.tensor([False] * 5 + [True])).warnings)
    for said in ("at once", "silent", "above", "negative", "the same to the model"):
        assert said not in words


def test_a_dose_is_above_what_was_observed_if_the_activation_that_it_leaves_is(subject: Subject) -> None:
    """The largest that was observed is a little above dose 1; doses are added to, or scale, what the image has."""
    (one,) = subject.describe([RED])
    red, most = pixels(["grey"] * 5 + ["red"]), one.most / one.scale
    here = float(run(subject, RED, of=red).acts_bkl.max()) / one.scale
    assert most > 1 and 0.5 < here <= most
    little = min(0.01, (most - 1) / 2)
    for kind, least in (("set", most), ("add", most - here), ("scale", most / here)):
        for dose, is_above in ((least - little, False), (least + little, True)):
            found = run(subject, RED, of=red, doses=[dose], kind=kind)
            assert any("above what was observed" in warning for warning in found.warnings) == is_above, (kind, dose)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"doses": [0.5, math.nan]}, "doses: got nan; expected finite numbers"),
        ({"doses": [math.inf]}, "doses: got inf"),
        ({"doses": ["1"]}, "doses: got '1'"),
        ({"doses": [True]}, "doses: got True"),
        ({"doses": []}, "doses: there are none"),
        ({"doses": [1, 1.0]}, "doses: got 1 twice"),
        ({"kind": "ablate"}, "kind is 'ablate'; allowed values are set, add, scale; to ablate is to set 0"),
        ({"of": TWO[:0]}, "there are no images"),
        ({"draws": 0}, "draws is 0"),
        ({"draws": 10**6}, "more than 2,000 arms"),
        ({"tokens": "cls"}, "no class token is kept at tiles"),
        ({"tokens": torch.eye(2, 6).bool() & torch.tensor([[True], [False]])}, "the mask of image 1 is False everywhere"),
        ({"tokens": torch.ones(2, 7, dtype=torch.bool)}, "the mask has 7 tokens, but 6 are kept at tiles"),
    ],
)
def test_what_cannot_be_run_is_refused(subject: Subject, options: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        run(subject, RED, **options)
