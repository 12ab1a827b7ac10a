"""Proves what `measure` says of latents whose effect on the output is known.

The model reads three colours of its tokens. Three latents are detectors of a colour that write it; all others detect a mixture of colours
as well, but write where the model does not read.
"""

import gc
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ommatid.config import Params
from ommatid.config.intervene import BestLatents, ListedLatents
from ommatid.errors import InputError
from ommatid.events import Event, Warned
from ommatid.images.labels import list_split
from ommatid.intervene import measure as measure_module
from ommatid.intervene.edit import Edit
from ommatid.intervene.erasure import Erasure
from ommatid.intervene.firings import find_firings
from ommatid.intervene.latent_test import Found, LatentTest
from ommatid.intervene.measure import Measured, measure
from ommatid.intervene.output_scores import N_TRIED, output_scores
from ommatid.intervene.study import Study
from ommatid.intervene.subject import Subject
from ommatid.store import Artefact
from support.readers import DRAWS, PLANTED, make_reader_line, make_reader_params, wide_tile_model
from support.tiles import TileModel, WithoutText, use_tile_model


@pytest.fixture(scope="module", autouse=True)
def wide_model() -> Iterator[None]:
    with wide_tile_model():
        yield


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Params:
    return make_reader_params(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory, wide_model: None, params: Params) -> dict[str, Artefact]:
    return make_reader_line(tmp_path_factory.mktemp("line"), params)


def run(
    line: Mapping[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch, model: TileModel | None = None, **changes: Any
) -> Measured:
    use_tile_model(monkeypatch, model)
    found = measure(
        params.intervene.model_copy(update=changes), Subject(line, head=changes.get("head", params.intervene.head)), lambda event: None
    )
    assert isinstance(found, Measured), found
    return found


def test_latents_that_the_model_reads_are_causal_and_no_others(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(line, params, monkeypatch)
    statuses = {row["latent"]: row["status"] for row in found.effects}
    assert len(statuses) > 8 and {latent for latent, status in statuses.items() if status == "causal"} == set(PLANTED)
    assert set(statuses.values()) == {"causal", "reads_only", "untested"}
    assert found.zero_dose == 0 and found.random_causal == 0
    for row in found.effects:
        if row["status"] == "untested":
            assert row["reason"] == "it is dead: it never fires"
        elif row["latent"] in PLANTED:
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
    assert of["other_label", "toward_label"]["n_draws"] == 2 and of["other_label", "toward_label"]["value"] < 0.05


def test_removal_is_that_of_a_loop_over_all_images_although_silent_ones_are_left_out(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(line, params, monkeypatch, doses=(0.0,), latents=ListedLatents(kind="listed", latents=(0, 1)))
    study = Study(params.intervene, Subject(line))
    ((described,), study.chosen) = (list(study.subject.describe([0])), [0, 1])
    editor, movement = study.subject.editor([described]), study.movement(described)
    remove = editor.replacement(Edit((0,), "ablate"))
    moved, fires = [], []
    for _, pixels in study.iter_pixels():
        plain, edited = study.subject.model.splice(pixels, "tiles", [lambda tokens: tokens, remove])
        moved.append(movement(plain, edited)[:, 0])
        fires.append((plain != edited).any(1))
    assert 0 < int(torch.cat(fires).sum()) < len(study.images) == 32
    (row,) = (row for row in found.interventions if (row["latent"], row["arm"], row["outcome"]) == (0, "targeted", "toward_label"))
    assert row["value"] == pytest.approx(float(torch.cat(moved).mean()), rel=1e-5) and row["value"] < 0


def test_latents_are_tested_in_as_many_passes_as_memory_needs(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass runs the model up to the hookpoint once for each batch; what comes out is the same."""
    listed = {"latents": ListedLatents(kind="listed", latents=(0, 1, 2)), "n_images": 16}
    whole = run(line, params, monkeypatch, **listed)
    monkeypatch.setattr(measure_module, "KEPT", 1)
    runs: list[int] = []
    original = measure_module._run
    monkeypatch.setattr(measure_module, "_run", lambda study, tests, *more: runs.append(len(tests)) or original(study, tests, *more))
    assert run(line, params, monkeypatch, **listed) == whole
    assert runs == [1, 1, 1]


def of_red(line: Mapping[str, Artefact]) -> torch.Tensor:
    """Positive activations of the red latent on the training tokens."""
    from ommatid.activations.batches import load_sample

    acts = load_sample(line["extract"], 2**17) @ TileModel().spread[0]
    return acts[acts > 0.3]


def test_a_run_is_repeated_exactly(line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: dict[str, Any] = {"latents": BestLatents(kind="best", by=("ms",), n=3)}
    one, other = (run(line, params, monkeypatch, **chosen) for _ in range(2))
    assert one == other and len(one.effects) == 3


def test_classes_are_attributed_to_the_latents_that_the_model_reads(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the model does not read has no effect; the first latents' effects by gradients have the sign of those by ablation."""
    found = run(line, params, monkeypatch, latents=BestLatents(kind="best", by=("ms",), n=1))
    assert found.attributions
    of_unread = [row["effect"] for row in found.attributions if row["latent"] not in PLANTED]
    by_class = {row["output"]: row for row in found.attributions if row["rank"] == 1}
    assert all(row["latent"] in PLANTED and row["exact"] * row["effect"] > 0 for row in by_class.values())
    assert max(map(abs, of_unread), default=0) < 1e-4 * max(abs(row["effect"]) for row in by_class.values())


def test_without_a_text_tower_latents_that_the_model_reads_are_causal_for_their_class_and_no_others(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head is fitted to the training images; a latent's class takes the place of its label."""
    found = run(line, params, monkeypatch, model=WithoutText())
    assert {row["latent"] for row in found.effects if row["status"] == "causal"} == set(PLANTED)
    assert {row["status"] for row in found.effects} == {"causal", "reads_only", "untested"}
    of_red = {
        (row["arm"], row["dose"]): row["value"] for row in found.interventions if (row["latent"], row["outcome"]) == (0, "toward_label")
    }
    assert of_red["targeted", 1.0] > 1 > -1 > of_red["sign_flipped", 1.0] and of_red["targeted", 0.0] < 0
    assert {row["output"] for row in found.attributions} == {"red", "green", "blue"}


def test_movement_toward_a_class_is_that_of_its_logit_less_the_mean_of_the_others(
    line: dict[str, Artefact], params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tile_model(monkeypatch, WithoutText())
    weight = torch.tensor([[0.0, 0.0, 3.0], [0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
    save_file({"weight": weight, "bias": torch.zeros(3)}, tmp_path / "head", {"names": json.dumps(["blue", "green", "red"])})
    study = Study(params.intervene, Subject(line, head=str(tmp_path / "head")))
    (red,) = study.subject.describe([0])
    assert red.top_class == "red"
    moved = study.movement(red)(torch.zeros(2, 3), torch.tensor([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]]))
    assert moved[:, 0].tolist() == [1 - (2 + 3) / 2, 5.0]


def test_without_labels_of_images_outcomes_that_need_none_are_measured_and_the_status_says_why_not(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("ommatid.intervene.head.load_labels", "ommatid.intervene.subject.load_classes"):
        monkeypatch.setattr(module, lambda *_: {})
    found = run(line, params, monkeypatch, model=WithoutText(), latents=BestLatents(kind="best", by=("ms",), n=2))
    assert {row["outcome"] for row in found.interventions} == {"drift"}
    assert [row["status"] for row in found.effects] == ["untested"] * 2
    assert all("needs training images with labels of two or more classes" in row["reason"] for row in found.effects)
    assert found.zero_dose == 0 and found.random_causal is None and found.attributions == []


def test_a_listed_latent_without_a_label_is_run_and_untested(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Subject, "labels", {latent: row for latent, row in Subject(line).labels.items() if latent != 1})
    found = run(line, params, monkeypatch, latents=ListedLatents(kind="listed", latents=(0, 1)))
    statuses = {row["latent"]: (row["status"], row.get("reason")) for row in found.effects}
    assert statuses == {0: ("causal", None), 1: ("untested", "it has no label toward which an edit could move the output")}
    assert {row["outcome"] for row in found.interventions if row["latent"] == 1} >= {"drift", "specificity"}


@pytest.mark.parametrize("by", ["attribution", "output_score"])
def test_latents_that_the_model_reads_rank_first_by_what_they_do(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch, by: Any
) -> None:
    found = run(line, params, monkeypatch, latents=BestLatents(kind="best", by=(by,), n=3), n_images=16)
    assert {row["latent"] for row in found.effects} == set(PLANTED)
    sizes = {latent: row["attribution"] for latent, row in found.latents.items()}
    assert min(sizes[latent] for latent in PLANTED) > 1e3 * max(size for latent, size in sizes.items() if latent not in PLANTED)


def test_several_rankings_take_turns_and_those_without_numbers_are_warned_of(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tested(*by: Any, n: int = 3) -> list[int]:
        found = run(line, params, monkeypatch, latents=BestLatents(kind="best", by=by, n=n), n_images=16)
        return [row["latent"] for row in found.effects]

    by_ms = tested("ms", n=6)
    assert len(by_ms) == 6
    assert tested("ms", "attribution") == by_ms[:3] + [latent for latent in tested("attribution", n=6) if latent not in by_ms[:3]][:3]
    monkeypatch.setattr("ommatid.intervene.subject.load_classes", lambda _: {})
    use_tile_model(monkeypatch)
    chosen = params.intervene.model_copy(update={"latents": BestLatents(kind="best", by=("attribution", "ms"), n=6), "n_images": 16})
    events: list[Event] = []
    found = measure(chosen, Subject(line), events.append)
    assert isinstance(found, Measured) and [row["latent"] for row in found.effects] == by_ms
    warnings = [event.what for event in events if isinstance(event, Warned)]
    assert len(warnings) == 1 and warnings[0].startswith("planted: latents cannot be ranked by attribution, as no class is read")


def test_latents_cannot_be_ranked_by_what_they_do_to_classes_without_any(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tile_model(monkeypatch)
    monkeypatch.setattr("ommatid.intervene.subject.load_classes", lambda _: {})
    chosen = params.intervene.model_copy(update={"latents": BestLatents(kind="best", by=("attribution",), n=3)})
    found = measure(chosen, Subject(line), lambda event: None)
    assert isinstance(found, str)
    assert found.startswith(
        "latents cannot be ranked by attribution, as no class is read from the output: the evaluation images are not of"
    )


def test_the_scale_of_every_live_latent_is_the_quantile_of_its_positive_activations(
    line: dict[str, Artefact], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject(line)
    acts = subject.sae.encode(subject.sample)
    firings = find_firings(subject.sae, subject.sample)
    monkeypatch.setattr("ommatid.intervene.firings.ENTRIES", 2**10)
    assert torch.equal(find_firings(subject.sae, subject.sample).acts_n, firings.acts_n)
    for latent in range(subject.sae.n_latents):
        on = acts[:, latent] > 0
        assert firings.count(latent) == int(on.sum()) and sorted(firings.tokens(latent).tolist()) == on.nonzero()[:, 0].tolist()
        scale = float(acts[on, latent].quantile(0.99)) if on.any() else math.nan
        assert firings.scale(latent) == pytest.approx(scale, rel=1e-6, nan_ok=True)


def test_a_dictionary_that_is_not_sparse_is_described_by_fewer_tokens(line: dict[str, Artefact], monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(line)
    monkeypatch.setattr("ommatid.intervene.firings.ENTRIES", 100 * subject.sae.n_latents)
    monkeypatch.setattr("ommatid.intervene.firings.MOST", 1)
    assert find_firings(subject.sae, subject.sample).n_tokens == 100


def test_probes_see_the_mean_token_of_labelled_images_and_rows_name_every_arm(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(line, params, monkeypatch, latents=ListedLatents(kind="listed", latents=(0,)), n_images=16)
    subject = Subject(line)
    erasure = Erasure(subject, [0, 2])
    tokens = torch.cat(
        [subject.reads.pick(subject.model.capture(x, ["tiles"]).tokens["tiles"]) for _, x in subject.load_pixels(erasure.images)]
    )
    torch.testing.assert_close(erasure._pooled, tokens.mean(1), atol=1e-3, rtol=1e-2)
    acts = subject.sae.encode(tokens.flatten(0, 1))[:, [0, 2]].unflatten(0, tokens.shape[:2]).mean(1)
    torch.testing.assert_close(erasure._acts, acts, atol=1e-3, rtol=1e-2)
    rows = [row for row in found.interventions if row["outcome"] == "erasure"]
    arms = {"none": 1, "targeted": 1, "random_latent": 2, "random_direction": 2, "diff_means": 1, "leace": 1}
    assert {row["arm"]: row["n_draws"] for row in rows} == arms
    assert {(row["dose"], row["n_images"]) for row in rows} == {(0.0, len(subject.classes) // 2)}
    assert next(row["value"] for row in rows if row["arm"] == "none") == 1


def test_latents_are_ranked_by_output_score_on_images_on_which_none_is_tested(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A score in which every image counts once, by the classes that the latent raises on the images of the other half."""
    use_tile_model(monkeypatch)
    study = Study(params.intervene, Subject(line))
    study.subject.reads  # noqa: B018 - checks the weights with an image
    loaded: list[int] = []
    original = Subject.load_pixels
    monkeypatch.setattr(Subject, "load_pixels", lambda subject, images: loaded.extend(images) or original(subject, images))
    found = output_scores(study, range(14))
    assert len(loaded) == len(set(loaded)) == N_TRIED and not set(loaded) & set(study.images)
    assert set(loaded) <= set(list_split(line["images"], "train"))
    readout, pixels = study.readout, torch.cat([x for part in (loaded[:8], loaded[8:]) for _, x in original(study.subject, part)])
    assert readout
    (red,) = study.subject.describe([0])
    edit = study.subject.editor([red]).replacement(Edit((0,), "set", 1.0))
    plain, edited = map(readout.log_probabilities, study.subject.model.splice(pixels, "tiles", [lambda tokens: tokens, edit]))
    expected = []
    for image in range(N_TRIED):
        other = slice(8, None) if image < 8 else slice(0, 8)
        raised = int((edited - plain)[other].mean(0).argmax())
        best = [float((1 - (one[image] > one[image, raised]).double().mean()) * one[image, raised].exp()) for one in (edited, plain)]
        expected.append(best[0] - best[1])
    assert found[0] == pytest.approx(sum(expected) / N_TRIED, rel=1e-6)
    assert found[0] > 0.1 > max(abs(score) for latent, score in found.items() if latent not in PLANTED)


def test_without_training_images_latents_are_not_ranked_by_output_score(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tile_model(monkeypatch)
    monkeypatch.setattr("ommatid.intervene.output_scores.list_split", lambda *_: [])
    with pytest.raises(InputError, match="as there are no training images; name ms in"):
        output_scores(Study(params.intervene, Subject(line)), [0])


def test_the_tests_of_all_latents_share_the_embeddings_of_labels(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy for each would grow with the square of the number of latents."""
    use_tile_model(monkeypatch)
    study = Study(params.intervene, Subject(line))
    study.chosen = [0, 1]
    d, n = study.subject.model.d_output, len(study.texts)
    tables = lambda: sum(type(one) is torch.Tensor and one.shape == (n, d) and one.dtype == torch.float64 for one in gc.get_objects())  # noqa: E731
    first, *more = (study.movement(one) for one in study.subject.describe([0, 1]))
    both = tables()
    del more
    assert both == tables() and len(first(torch.rand(2, d), torch.rand(2, d))) == 2


def test_no_tokens_are_kept_of_a_batch_after_it(line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of latents are tested in one pass, each with an editor of its own, which would hold a copy of them."""
    use_tile_model(monkeypatch)
    study = Study(params.intervene, Subject(line))
    (red,) = study.subject.describe([0])
    test = LatentTest(study, red)
    _, pixels = next(study.iter_pixels())
    read = study.subject.model.capture(pixels, ["tiles"]).tokens["tiles"]
    kept = study.subject.reads.pick(read).shape
    count = lambda: sum(type(one) is torch.Tensor and one.ndim == 3 and one.shape[1:] == kept[1:] for one in gc.get_objects())  # noqa: E731
    before = count()
    test.editor.read(read)
    assert count() == before + 1
    test.run(pixels, read)
    assert count() == before


@pytest.mark.parametrize(
    ("doses", "fires", "reason"),
    [
        ((0.0,), 7, "it fires on 7 of 32 images, and its removal is tested on 8 or more; name a dose above 0 and up to 1"),
        ((2.0,), 7, "no dose from 0 to 1 is named, and only such doses decide"),
    ],
)
def test_an_untested_latent_says_which_doses_are_wanted(
    line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch, doses: Any, fires: int, reason: str
) -> None:
    """Removal from a few images is no test of the latent, and none of the random one in its place either."""
    original = LatentTest.finish

    def finish(test: LatentTest, spread: float) -> Found:
        test.fires = [torch.arange(len(test.study.images)) < fires]
        return original(test, spread)

    monkeypatch.setattr(LatentTest, "finish", finish)
    found = run(line, params, monkeypatch, doses=doses, latents=ListedLatents(kind="listed", latents=(0,)))
    assert found.effects[0]["status"] == "untested" and found.effects[0]["reason"].startswith(reason)
    assert found.random_causal is None
