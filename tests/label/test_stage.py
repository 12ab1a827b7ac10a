"""Proves that several labellers work side by side, that a failing one harms no other, and that scores tell good labels from bad ones."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from ommatid import schemas
from ommatid.config import LabelParams, Params
from ommatid.errors import ConfigError
from ommatid.events import Event, Warned, ignore
from ommatid.images.eval_split import load_eval_split
from ommatid.label import context
from ommatid.label.context import load_material
from ommatid.label.evidence import Test as Trials
from ommatid.label.labellers import ImageLabeller, Source
from ommatid.label.labellers.base import Answer, Case
from ommatid.label.scoring import find_mistakes
from ommatid.label.stage import label
from ommatid.quality import check
from ommatid.reviews import ReviewLog
from ommatid.store import Artefact, Draft, open_draft
from support.study import make_artefact, make_test_params
from support.tiles import ALWAYS, COLOURS, D_SAE, DEAD, MIXED, PURE, use_tile_model

Rows = dict[tuple[int, str], dict[str, Any]]
Mistakes = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def _tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    use_tile_model(monkeypatch)


def label_params(params: Params, *labellers: Mapping[str, Any], **more: Any) -> LabelParams:
    return LabelParams.model_validate(params.label.model_dump() | {"labellers": labellers} | more)


def run(root: Path, params: LabelParams, line: Mapping[str, Artefact], asked: Source | None = None, hear: Any = ignore) -> Artefact:
    """Run the stage; `asked` replaces the last labeller of the params."""

    def stage(params: LabelParams, inputs: Mapping[str, Artefact], draft: Draft) -> Artefact:
        found = load_material(params, inputs)
        if asked:
            names = list(found.sources)
            found = type(found)({**found.sources, names[-1]: asked}, found.texts, found.split, found.images)
        return label(params, inputs, draft, hear, found)

    return make_artefact(root / "labels", "labels", stage, params, line)


def rows_of(artefact: Artefact) -> Rows:
    return {(row["latent"], row["labeller"]): row for row in artefact.read("labels").to_pylist()}


def write_labels(folder: Path, labels: Mapping[int, str]) -> dict[str, str]:
    path = folder / "labels.csv"
    path.write_text("latent,label\n" + "".join(f"{latent},{text}\n" for latent, text in labels.items()))
    return {"kind": "human", "path": str(path)}


class Eyes:
    """A labeller with scripted answers, and a detector whose grades depend on the label alone."""

    name = "eyes"

    def __init__(self, says: Callable[[int], Answer]) -> None:
        self.asked: list[int] = []
        self.n_shown = 0
        self._says = says

    def answer(self, case: Case) -> Answer:
        self.asked.append(case.latent)
        return self._says(case.latent)

    def fires(self, label: str, images: tuple[bytes, ...]) -> tuple[float, ...] | None:
        self.n_shown += len(images)
        return None if label == "none" else tuple(float(label == "always") for _ in images)


def vocabulary(words: Path, **more: str) -> dict[str, Any]:
    return {"kind": "vocabulary", "words": [str(words)], **more}


@pytest.mark.parametrize("by", ["mean", "soft_wpmi"])
def test_both_criteria_choose_the_planted_colours(tmp_path: Path, line: dict[str, Artefact], params: Params, words: Path, by: str) -> None:
    rows = rows_of(run(tmp_path, label_params(params, vocabulary(words, by=by)), line))
    assert {latent: rows[latent, "vocabulary"]["label"] for latent in PURE} == PURE
    for latent in PURE:
        row = rows[latent, "vocabulary"]
        assert row["score"] > 0.9 > max(row["control_score"], row["random_score"])
        assert row["correlation"] > 0.6 > row["control_correlation"] + 0.3
        assert min(row["precision"], row["recall"]) > 0.85 > 0.6 > max(row["precision_chance"], row["recall_chance"])
        assert row["similarity"] > 0.9


def test_labellers_are_scored_side_by_side_on_the_same_images(
    tmp_path: Path, line: dict[str, Artefact], params: Params, words: Path
) -> None:
    human = write_labels(tmp_path, {0: "red", 1: "blue", DEAD: "nothing to see", ALWAYS: "grey"})
    labelled = run(tmp_path, label_params(params, vocabulary(words), human), line)
    rows = rows_of(labelled)
    assert sorted(rows) == sorted([(i, "vocabulary") for i in range(D_SAE)] + [(i, "human") for i in (0, 1, DEAD, ALWAYS)])
    same = ("label", "score", "auroc", "random_score", "correlation", "similarity")
    assert all(rows[0, "human"][key] == rows[0, "vocabulary"][key] for key in same)
    assert rows[1, "human"]["score"] < 0.6 < 0.9 < rows[1, "vocabulary"]["score"]
    # what people say of a latent stands, whether or not there are images to try it on
    assert (rows[DEAD, "human"]["status"], rows[DEAD, "human"]["score"]) == ("ok", None)
    assert (rows[DEAD, "vocabulary"]["status"], rows[DEAD, "vocabulary"]["label"]) == ("too_few_examples", None)
    assert (rows[ALWAYS, "human"]["label"], rows[ALWAYS, "human"]["score"]) == ("grey", None)
    summary = labelled.summary
    assert summary["labellers"] == ["vocabulary", "human"]
    assert summary["n_labelled_vocabulary"] == 5
    assert summary["n_labelled_human"] == 4
    assert summary["n_labelled"] == D_SAE
    shown = [rows[0, "human"], rows[1, "human"], rows[2, "vocabulary"], rows[MIXED, "vocabulary"]]  # people come first, right or wrong
    assert summary["score"] == pytest.approx(sum(row["score"] for row in shown) / 4)
    assert summary["beats_control"] >= 0.75  # red, of the latent that fires on red and green, has red as its control perhaps
    assert summary["n_images_in_both"] == 0


def test_mistakes_add_up_to_the_score_and_the_first_of_them_are_kept(
    tmp_path: Path, line: dict[str, Artefact], params: Params, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    human = write_labels(tmp_path, {0: "red", 1: "blue", 2: "grey", DEAD: "nothing to see", ALWAYS: "grey"})
    asked = label_params(params, vocabulary(words), human)
    kept = run(tmp_path / "kept", asked, line).read("mistakes").to_pylist()
    monkeypatch.setattr(schemas, "N_MISTAKES", 10**6)
    whole = run(tmp_path / "whole", asked, line)
    labels, split = rows_of(whole), load_eval_split(line["images"])
    material = load_material(asked, line)
    images = dict(zip(split.images.tolist(), material.images, strict=True))
    is_held_out = dict(zip(split.images.tolist(), split.is_held_out.tolist(), strict=True))
    fired: dict[int, dict[int, float]] = {latent: {} for latent in range(D_SAE)}
    for row in line["evaluate"].read("firings").to_pylist():
        fired[row["latent"]][row["image"]] = row["act"]
    found: dict[tuple[int, str], dict[str, Mistakes]] = {key: {"missed": [], "false_alarm": []} for key in labels}
    for row in whole.read("mistakes").to_pylist():
        found[row["latent"], row["labeller"]][row["kind"]].append(row)
    for (latent, labeller), label_row in labels.items():
        missed, false_alarms = found[latent, labeller].values()
        if label_row["score"] is None:
            assert not missed and not false_alarms
            continue
        n_firing = min(64, sum(is_held_out[image] for image in fired[latent]))
        n_silent = min(n_firing, sum(is_held_out.values()) - sum(is_held_out[image] for image in fired[latent]))
        assert label_row["score"] == pytest.approx(1 - (len(missed) / n_firing + len(false_alarms) / n_silent) / 2)
        text = material.texts.embed([label_row["label"]])[0]
        for row in (*missed, *false_alarms):
            assert is_held_out[row["image"]] and row["cosine"] == pytest.approx(float(images[row["image"]] @ text), abs=1e-5)
            assert row["threshold"] == (*missed, *false_alarms)[0]["threshold"]
        assert all(row["cosine"] <= row["threshold"] and row["act"] == fired[latent][row["image"]] > 0 for row in missed)
        assert all(row["cosine"] > row["threshold"] and row["act"] == 0 and row["image"] not in fired[latent] for row in false_alarms)
        assert all(row["is_hard"] is None for row in missed)
        hard = [row["image"] for row in false_alarms if row["is_hard"]]
        assert len(hard) <= n_silent // 2 and all(any(image in images for images in fired.values()) for image in hard)
        assert [row["image"] for row in missed] == sorted([row["image"] for row in missed], key=by(missed, 1))
        assert [row["image"] for row in false_alarms] == sorted([row["image"] for row in false_alarms], key=by(false_alarms, -1))
    assert any(len(rows["missed"]) > 4 for rows in found.values()) and any(len(rows["false_alarm"]) > 4 for rows in found.values())
    assert {row["is_hard"] for row in kept} == {None, True, False}
    assert kept == [row for row in whole.read("mistakes").to_pylist() if row["rank"] <= 4]


def by(mistakes: Mistakes, sign: int) -> Callable[[int], tuple[float, int]]:
    """The key that sorts images by the cosine of a mistake, and equal ones by number."""
    cosines = {row["image"]: sign * row["cosine"] for row in mistakes}
    return lambda image: (cosines[image], image)


def test_of_equally_wrong_images_the_lower_numbers_come_first() -> None:
    test = Trials(np.array([9, 3, 6, 1]), np.array([1.0, 2.0, 3.0, 4.0]), np.array([8, 2]), np.array([7, 0]))
    found = find_mistakes(test, torch.tensor([0.1, 0.1, 0.5, 0.4]), torch.tensor([0.5, 0.6, 0.6, 0.2]), 0.4)
    assert found[["row", "rank", "act"]].tolist() == [(3, 1, 2.0), (9, 2, 1.0), (1, 3, 4.0), (2, 1, 0.0), (7, 2, 0.0), (8, 3, 0.0)]
    assert found["is_missed"].tolist() == [True] * 3 + [False] * 3
    assert found["is_hard"].tolist() == [False] * 3 + [True, False, True]


def test_scores_do_not_depend_on_other_labellers(tmp_path: Path, line: dict[str, Artefact], params: Params, words: Path) -> None:
    alone = rows_of(run(tmp_path / "a", label_params(params, vocabulary(words)), line))
    human = write_labels(tmp_path, {0: "something else"})
    both = rows_of(run(tmp_path / "b", label_params(params, human, vocabulary(words)), line))
    for latent in range(D_SAE):
        assert both[latent, "vocabulary"] == {**alone[latent, "vocabulary"], "place": 2}


def test_two_labellers_of_a_kind_are_numbered(tmp_path: Path, line: dict[str, Artefact], params: Params, words: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("grey\ngrey\n\ngreen\n")
    rows = rows_of(run(tmp_path, label_params(params, vocabulary(words), vocabulary(other)), line))
    assert {row["label"] for (_, name), row in rows.items() if name == "vocabulary-2"} == {"grey", "green", None}
    assert {latent: rows[latent, "vocabulary"]["label"] for latent in PURE} == PURE


def test_labels_by_people_alone_are_scored_against_default_words(
    tmp_path: Path, line: dict[str, Artefact], params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context, "load_words", lambda lists: tuple(COLOURS))
    rows = rows_of(run(tmp_path, label_params(params, write_labels(tmp_path, {0: "red"})), line))
    assert list(rows) == [(0, "human")]
    row = rows[0, "human"]
    assert row["score"] > 0.9 > row["random_score"]
    assert row["control_score"] is None  # nobody named another latent


def test_a_labeller_that_fails_is_reported_and_leaves_the_others_alone(
    tmp_path: Path, line: dict[str, Artefact], params: Params, words: Path
) -> None:
    heard: list[Event] = []
    eyes = Eyes(lambda latent: Answer("ok", "grey") if latent == MIXED else Answer("failed", detail="no server at http://x"))
    section = label_params(params, vocabulary(words), vocabulary(words))
    labelled = run(tmp_path, section, line, ImageLabeller(eyes, eyes), heard.append)
    rows = rows_of(labelled)
    assert {latent: rows[latent, "vocabulary"]["label"] for latent in PURE} == PURE
    assert [rows[latent, "vocabulary-2"]["status"] for latent in range(D_SAE)] == [*["failed"] * 3, "ok", "too_few_examples", "failed"]
    assert rows[0, "vocabulary-2"]["detail"] == "no server at http://x"
    assert rows[0, "vocabulary-2"]["score"] is None
    (warning,) = [event for event in heard if isinstance(event, Warned)]
    assert "vocabulary-2 has no label for 4 of 6 latents: 4 failed; most often: no server at http://x" in warning.what
    assert report_of(labelled, params, section).success


def report_of(labelled: Artefact, params: Params, section: LabelParams) -> Any:
    class Labellings:
        """A training with these labels."""

        summary: Mapping[str, Any] = {}

        def each(self) -> dict[str, Artefact]:
            return {"one": labelled}

    return check("label", Labellings(), params.model_copy(update={"label": section}), {"one": params.train})  # type: ignore[arg-type]


def test_the_gate_fails_if_all_labellers_fail(tmp_path: Path, line: dict[str, Artefact], params: Params, words: Path) -> None:
    eyes = Eyes(lambda latent: Answer("failed", detail="no server"))
    section = label_params(params, vocabulary(words))
    (failure,) = report_of(run(tmp_path, section, line, ImageLabeller(eyes)), params, section).failures
    assert failure.name == "some latent has a label"
    assert "5 failed, 1 too_few_examples" in failure.detail


def test_labels_that_are_empty_or_contradict_their_status_are_dropped(
    tmp_path: Path, line: dict[str, Artefact], params: Params, words: Path
) -> None:
    said = {0: Answer("ok", "  "), 1: Answer("ok", None), 2: Answer("refused", "I would rather not"), MIXED: Answer("ok", " red ")}
    eyes = Eyes(lambda latent: said.get(latent, Answer("unparsed")))
    rows = rows_of(run(tmp_path, label_params(params, vocabulary(words)), line, ImageLabeller(eyes)))
    assert [(rows[i, "vocabulary"]["status"], rows[i, "vocabulary"]["label"]) for i in (0, 1, 2, MIXED)] == [
        ("unparsed", None),
        ("unparsed", None),
        ("refused", None),
        ("ok", "red"),
    ]


def test_the_scores_of_a_detector_are_added(tmp_path: Path, line: dict[str, Artefact], params: Params, words: Path) -> None:
    said = {0: "always", 1: "never", 2: "none"}
    eyes = Eyes(lambda latent: Answer("ok", said.get(latent, "never")))
    rows = rows_of(run(tmp_path, label_params(params, vocabulary(words)), line, ImageLabeller(eyes, eyes, 3)))
    # true of all images or of none: chance; no answer: no score; nothing to tell apart: not asked
    for latent in (0, 1):
        assert (rows[latent, "vocabulary"]["detector_score"], rows[latent, "vocabulary"]["detector_auroc"]) == (0.5, 0.5)
    assert rows[2, "vocabulary"]["detector_score"] is None
    assert rows[ALWAYS, "vocabulary"]["detector_score"] is None
    assert 4 * 8 < eyes.n_shown <= 4 * 16


def test_a_killed_run_continues_without_asking_again(tmp_path: Path, line: dict[str, Artefact], params: Params, words: Path) -> None:
    class Killed(BaseException):
        pass

    def say(latent: int) -> Answer:
        if latent == MIXED:
            raise Killed
        return Answer("ok", "red", n_requests=2, n_tokens=100)

    section = label_params(params, vocabulary(words))
    dying, living = Eyes(say), Eyes(lambda latent: Answer("ok", "blue", n_requests=1, n_tokens=50))
    with pytest.raises(Killed):
        run(tmp_path, section, line, ImageLabeller(dying))
    labelled = run(tmp_path, section, line, ImageLabeller(living))
    assert dying.asked[:3] == [0, 1, 2]
    assert living.asked == [MIXED, ALWAYS]
    rows = rows_of(labelled)
    assert [rows[i, "vocabulary"]["label"] for i in (0, 1, 2, MIXED, ALWAYS)] == ["red", "red", "red", "blue", "blue"]
    assert (labelled.summary["n_requests"], labelled.summary["n_tokens"]) == (8, 400)


def test_latents_without_enough_images_have_a_status(tmp_path: Path, line: dict[str, Artefact], params: Params, words: Path) -> None:
    labelled = run(tmp_path, label_params(params, vocabulary(words), min_examples=200), line)
    assert {row["status"] for row in rows_of(labelled).values()} == {"too_few_examples"}
    assert labelled.summary["score"] is None


def test_a_changed_file_of_words_or_labels_changes_the_identity(tmp_path: Path, params: Params) -> None:
    path = tmp_path / "words.txt"
    human = write_labels(tmp_path, {0: "red"})
    section = label_params(params, {"kind": "vocabulary", "words": ["imagenet", str(path)]}, human)
    found = [section.identity()]
    path.write_text("red\n")
    found.append(section.identity())
    path.write_text("red\nblue\n")
    found.append(section.identity())
    write_labels(tmp_path, {0: "blue"})
    found.append(section.identity())
    assert all(a != b for a, b in pairwise(found))
    assert found[-1] == section.identity()


def test_a_log_of_reviews_without_names_changes_nothing(tmp_path: Path, line: dict[str, Artefact], params: Params, words: Path) -> None:
    log = ReviewLog(tmp_path / "log.jsonl")
    human = {"kind": "human", "path": str(log.path)}
    alone = run(tmp_path / "a", label_params(params, vocabulary(words)), line)
    both = run(tmp_path / "b", label_params(params, vocabulary(words), human), line)
    assert both.read("labels").equals(alone.read("labels")) and both.summary == alone.summary
    heard: list[Event] = []
    with pytest.raises(ConfigError, match=r"label\.labellers: none has a label; name a feature"):
        load_material(label_params(params, human), line, heard.append)
    (warning,) = heard
    assert isinstance(warning, Warned) and "nobody has named a feature yet" in warning.what
    directions = load_file(line["train"].path / "sae.safetensors")["W_dec"]
    log.append("Ada", "retrained-0", 40, "rename", "blue", direction=lambda: directions[1])
    rows = rows_of(run(tmp_path / "c", label_params(params, vocabulary(words), human), line))
    assert [latent for latent, name in rows if name == "human"] == [1] and rows[1, "human"]["label"] == "blue"


@pytest.mark.parametrize("labellers", [[], [{"kind": "oracle"}], [{"kind": "vocabulary", "words": []}]])
def test_invalid_labellers_are_refused(labellers: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"label\.labellers"):
        make_test_params(label={"labellers": labellers})


def test_a_file_of_labels_for_other_latents_stops_the_stage(tmp_path: Path, line: dict[str, Artefact], params: Params) -> None:
    section = label_params(params, write_labels(tmp_path, {99: "red"}))
    with pytest.raises(ConfigError, match="line 2, column latent: got '99'"), open_draft(tmp_path / "x", "labels", {}, {}) as draft:
        label(section, line, draft)
