"""Through the stage, a tiny LLaVA says the word of a latent that is set, and of no control; its latents are causal, and no others."""

import csv
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ommatid
from ommatid import quality, store
from ommatid.config import Params
from ommatid.errors import ConfigError, InputError, ModelError
from ommatid.events import Event, Progress, ignore
from ommatid.intervene import answers, stage
from ommatid.intervene.answers import find_word, first_word, read_question
from ommatid.intervene.stage import intervene
from ommatid.show.doses import ALL_ARMS, DOSES, draw_doses, find_outcome
from ommatid.store import Artefact
from ommatid.summaries import check_keys
from ommatid.vlm import speaking
from ommatid.vlm.speaking import LlavaSpeaker, Said
from support.speaking_study import make_speaking_params, make_speaking_study, reader, use_namer
from support.study import run_verb
from support.tiny_llava import WORDS, draw, save_tiny_llava, save_tiny_qwen

PLANTED = {WORDS.index(word): word for word in ("grid", "fur")}
READERS = {reader("grid"): "grid"}
GRID = WORDS.index("grid")
UNLABELLED = [WORDS.index("leaf")]
"""A latent that fires on too few images for a label."""
Rows = dict[tuple[int, str, str, float], dict[str, Any]]


class Study:
    """A study and what the stage made of it."""

    def __init__(self, root: Path, save: Callable[[Path], Path]) -> None:
        self.root, self.model = root, save(root / "model")
        self.params: Params = make_speaking_params(root, self.model, [*PLANTED, *READERS])
        self.data = make_speaking_study(root, self.params)
        with ommatid.open_run(self.data) as run:
            self.line: Mapping[str, Artefact] = run.subject()[1].inputs
            self.whole = run.artefacts["intervene"]
        self.made = self.whole.each()["planted"]
        self.effects = {row["latent"]: row for row in self.made.read("effects").to_pylist()}
        rows = self.made.read("interventions").to_pylist()
        self.rows: Rows = {(row["latent"], row["outcome"], row["arm"], row["dose"]): row for row in rows}
        assert len(self.rows) == len(rows)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(tmp_path_factory.mktemp("study"), save_tiny_llava)


@pytest.fixture(scope="module")
def next_study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(tmp_path_factory.mktemp("next"), lambda folder: save_tiny_llava(folder, is_next=True))


@pytest.fixture(scope="module")
def qwen_study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(tmp_path_factory.mktemp("qwen"), save_tiny_qwen)


@pytest.fixture(params=["study", "next_study", "qwen_study"])
def any_study(request: pytest.FixtureRequest) -> Study:
    return request.getfixturevalue(request.param)


def said(study: Study, latent: int, arm: str, dose: float) -> float:
    """Return the share of the images that do not show the word about which the model says it."""
    row, shown = (study.rows[latent, "says_label", *key] for key in ((arm, dose), ("none", 0.0)))
    n_shown = round(shown["value"] * shown["n_images"])
    return (row["value"] * row["n_images"] - n_shown) / (row["n_images"] - n_shown)


@pytest.mark.parametrize("latent", PLANTED)
def test_a_clamped_latent_is_spoken_of_about_nearly_all_images_and_no_control_is(any_study: Study, latent: int) -> None:
    assert any_study.rows[latent, "says_label", "none", 0.0]["value"] == pytest.approx(1 / 13)  # the images that show it
    assert said(any_study, latent, "targeted", 1.0) >= 0.95
    for arm in ("sign_flipped", "random_latent", "random_direction"):
        assert said(any_study, latent, arm, 1.0) <= 0.15, arm
    assert said(any_study, latent, "untouched", 0.0) <= 0.15
    assert said(any_study, latent, "prompt", 0.0) >= 0.95
    grey = {arm: any_study.rows[latent, "grey_says_label", arm, 1.0]["value"] for arm in ("targeted", "sign_flipped", "random_latent")}
    assert grey == {"targeted": 1.0, "sign_flipped": 0.0, "random_latent": 0.0}


@pytest.mark.parametrize("latent", PLANTED)
def test_a_removed_latent_is_never_spoken_of_and_without_random_ones_it_still_is(any_study: Study, latent: int) -> None:
    assert any_study.rows[latent, "says_label", "targeted", 0.0]["value"] == 0
    assert any_study.rows[latent, "says_label", "random_latent", 0.0]["value"] == pytest.approx(1 / 13)
    assert any_study.rows[latent, "word_log_odds", "targeted", 0.0]["value"] < -0.2
    assert abs(any_study.rows[latent, "word_log_odds", "random_latent", 0.0]["value"]) < 0.02


def test_latents_that_make_the_model_speak_are_causal_and_others_are_not(any_study: Study) -> None:
    statuses = {latent: row["status"] for latent, row in any_study.effects.items() if row["status"] != "untested"}
    assert statuses == {**dict.fromkeys(PLANTED, "causal"), **dict.fromkeys(READERS, "reads_only")}
    for latent in PLANTED:
        row = any_study.effects[latent]
        assert row["outcome"] == "word_log_odds" and row["effect_low"] > row["best_control"] >= 0 and 0 < row["dose"] <= 1
        assert row["control_causal"] == "reads_only"
    assert any_study.made.summary["zero_dose"] == 0 and any_study.made.summary["random_causal"] == 0
    check_keys("effects", any_study.made.summary)


def test_the_gate_holds(any_study: Study) -> None:
    report = quality.check("intervene", any_study.whole, any_study.params, {"planted": any_study.params.train})
    assert report.success, report.failures


@pytest.mark.parametrize("latent", PLANTED)
def test_answers_shift_with_the_edit_but_not_on_the_latents_own_images(study: Study, latent: int) -> None:
    shift = {arm: study.rows[latent, "answer_shift", arm, 1.0]["value"] for arm in ("targeted", "sign_flipped", "random_latent")}
    assert shift["targeted"] > 1 > shift["random_latent"] > shift["sign_flipped"] >= 0
    drift = study.rows[latent, "answer_drift", "targeted", 1.0]
    assert 0 <= drift["value"] < 0.05 and drift["n_images"] >= 8
    assert (latent, "answer_drift", "targeted", 0.0) not in study.rows


@pytest.mark.parametrize("latent", PLANTED)
def test_the_steering_score_rises_with_the_planted_latent(study: Study, latent: int) -> None:
    scale = study.effects[latent]["act"] / study.effects[latent]["dose"]
    targeted = study.rows[latent, "steering_score", "targeted", 100 / scale]
    none, untouched = (study.rows[latent, "steering_score", arm, 0.0]["value"] for arm in ("none", "untouched"))
    assert targeted["value"] > 0.95 and none == untouched < 0.3 and targeted["n_images"] == 39


def test_pages_say_what_the_answers_are_about(study: Study) -> None:
    with ommatid.open_run(study.data) as run:
        rows = run.catalog.ask(DOSES, {"sae": "planted", "latent": GRID}).dicts()
    assert find_outcome(rows).does == "makes the model say its name" and {row["outcome"] for row in rows} == {"word_log_odds"}
    says = {(row["arm"], row["dose"]): row["says"] for row in rows}
    assert says["targeted", 1.0] == says["prompt", 0.0] == 1 and says["targeted", 0.0] == 0
    assert all(row["says_plain"] == pytest.approx(1 / 13) for row in rows) and {row["arm"] for row in rows} == {*ALL_ARMS} - {"other_label"}
    assert "log-odds of saying its name, nats" in str(draw_doses(rows))


def test_readers_are_not_spoken_of(study: Study) -> None:
    for latent in READERS:
        assert said(study, latent, "targeted", 0.0) == said(study, latent, "targeted", 1.0) == 0
        assert abs(study.rows[latent, "word_log_odds", "targeted", 1.0]["value"]) < 1e-5


# Given images


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    """Photographs of a star, of nothing and of a grid."""
    names = ["star.png", "nothing.png", "grid.png"]
    for name, image in zip(names, draw(["star", None, "grid"], seed=5), strict=True):
        image.save(tmp_path / name)
    return [str(tmp_path / name) for name in names]


def test_a_question_about_given_images_is_answered_in_every_arm(study: Study, photos: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with ommatid.open_run(study.data) as run:
        found = run.ask(photos, GRID, [1, 0], draws=3, dtype="float32")
        monkeypatch.setattr("ommatid.intervene.steering.BATCH", 2)
        again = run.ask(photos, GRID, [0, 1], draws=3, dtype="float32")
    assert repr(found) == f"Answers(3 images, latent {GRID}, doses 0 and 1, 'What is shown in this image? Use exactly one word!')"
    assert found.answers("none") == found.answers("untouched") == [("star", "nothing", "grid")]
    assert found.answers("targeted", 0) == [("star", "nothing", "nothing")]
    assert found.answers("targeted", 1) == found.answers("prompt") == [("grid",) * 3]
    assert found.answers("sign_flipped", 1) == [("star", "nothing", "grid")] and len(found.answers("random_latent", 1)) == 3
    assert again.answered.answers == found.answered.answers and again.answered.arms == found.answered.arms
    torch.testing.assert_close(again.answered.log_odds_ab, found.answered.log_odds_ab, atol=1e-4, rtol=1e-4)
    table = found.table()
    assert len(table) == 3 * (3 + 2 * (3 + 2 * 3)) and table.image.unique().tolist() == photos
    targeted: Any = table[(table.arm == "targeted") & (table.dose == 1)]
    assert (targeted.log_odds - targeted.log_odds_before)[:2].min() > 3 and targeted["shift"].iloc[2] < 0.1 < targeted["shift"].iloc[0]
    assert targeted.answer_before.tolist() == ["star", "nothing", "grid"]
    assert found.answered.words == ("grid",) and found.answered.acts_bkl.shape == (3, 16, 1)
    assert any("is silent on 2 of 3 images" in warning for warning in found.warnings)
    with pytest.raises(InputError, match=r"arm 'targeted' was not run at dose 2; arms are none, .*, prompt, and doses 0 and 1"):
        found.answers("targeted", 2)


def test_without_a_label_there_are_no_log_odds_and_no_prompt(study: Study, photos: list[str], tmp_path: Path) -> None:
    with ommatid.open_run(study.data) as run:
        found = run.ask(photos, UNLABELLED, [1.0], draws=3, dtype="float32")
    assert found.answers("targeted", 1.0) == [("leaf",) * 3] and found.answered.words == ()
    assert not found.answered.places("prompt") and found.answered.log_odds_ab.isnan().all()
    found.save(tmp_path / "answers.json")
    saved = json.loads((tmp_path / "answers.json").read_text())
    assert saved["question"].startswith("What is shown") and saved["rows"][0]["log_odds"] is None
    with pytest.raises(InputError, match=r"answers\.png: results are written as \.csv, \.json"):
        found.save(tmp_path / "answers.png")


def test_patches_are_edited_in_every_view(next_study: Study, photos: list[str]) -> None:
    """A mask of all patches is the same as none, and of a view of three no patch is left out."""
    with ommatid.open_run(next_study.data) as run:
        shift = {}
        for name, patches in (("all", None), ("mask", np.ones((4, 4), bool)), ("corner", [(0, 0)])):
            found = run.ask(photos[:2], GRID, [1.0], patches=patches, draws=1, dtype="float32").answered
            shift[name] = found.of(found.shifts_ab, "targeted", 1.0)
        assert found.acts_bkl.shape == (2, 16, 1)
    assert torch.equal(shift["mask"], shift["all"]) and (shift["corner"] > 0).all() and (shift["corner"] < shift["all"] / 4).all()


def test_the_verb_prints_answers_in_words_for_each_arm_and_dose(
    study: Study, photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "question.txt").write_text("Use exactly one word !")
    options = ["--data", str(study.data), "--latent", str(GRID), "--draws", "3", "--question", str(tmp_path / "question.txt")]
    assert run_verb("steer", *photos[:2], *options, "--dose", "0,1", "--out", str(tmp_path / "answers.csv")) == 0
    out = capsys.readouterr().out
    for text in ("question: Use exactly one word !", 'as it is: "star"', 'with the label in the question: "grid"', "begins with 'grid'"):
        assert text in out
    dose_1 = out.split("dose 1: latent 3 set to ")[1].splitlines()
    assert dose_1[2].split()[:3] == ["the", "edit", '"grid"'] and re.search(r'sign flipped +"star" +0\.00 +\+0\.00', dose_1[3])
    assert re.search(r"random directions .*\[.*\]", out)
    with (tmp_path / "answers.csv").open() as file:
        assert next(csv.DictReader(file))["answer"] == "star"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--question", " "], "error: question: is empty; write a question"),
        (["--question", "gone.txt"], "error: question: gone.txt: cannot be read as UTF-8 text"),
        (["--question", "What?", "--text", "a dog"], "error: --question and --text are given"),
        (["--question", "What?", "--out", "x.png"], "error: x.png: results are written as .csv, .json"),
        (["--question", "In <image> ?"], "error: prompt: contains <image>, which stands for the image"),
        (["--question", "What?", "--dose", "1,x"], "error: --dose '1,x': 'x' is not a finite number"),
    ],
)
def test_the_verb_refuses_bad_questions(
    study: Study, photos: list[str], capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    assert run_verb("steer", photos[0], "--data", str(study.data), "--latent", "3", *options) == 1
    assert says in capsys.readouterr().err


# What is left out, and bad input


def run(study: Study, tmp_path: Path, **changes: Any) -> Artefact:
    """Run the stage again on one latent, with few images, and with changed values of `answers`."""
    section = {"question": "Use exactly one word !", "dtype": "float32", "batch": 20, **changes.pop("answers", {})}
    values = study.params.intervene.model_dump(mode="json") | {"answers": section, "n_images": 20, "draws": 3}
    values |= {"latents": {"kind": "listed", "latents": [*PLANTED][:1]}} | changes
    params = type(study.params.intervene).model_validate(values)
    with pytest.MonkeyPatch.context() as patch, store.open_draft(tmp_path / "effects", "effects", {}, {}) as draft:
        use_namer(patch, study.params)
        return intervene(params, study.line, draft, ignore)


def test_without_a_joint_model_there_is_no_steering_score(study: Study, tmp_path: Path) -> None:
    rows = run(study, tmp_path).read("interventions").to_pylist()
    assert {row["outcome"] for row in rows} == {outcome for _, outcome, _, _ in study.rows} - {"steering_score"}


def test_a_question_may_be_in_a_file(study: Study, tmp_path: Path) -> None:
    (tmp_path / "brick.txt").write_text("Use exactly one word : brick\n")
    rows = run(study, tmp_path, answers={"question": str(tmp_path / "brick.txt")}).read("interventions").to_pylist()
    (none,) = [row["value"] for row in rows if (row["outcome"], row["arm"]) == ("says_label", "none")]
    assert none == 0  # it says brick, of every image


def test_a_bad_question_is_refused_before_any_work(study: Study, tmp_path: Path) -> None:
    def start(question: str) -> None:
        stage.run(study.params.intervene.model_copy(update={"answers": answers.AnswersParams(question=question)}), {}, None)  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match=r"intervene\.answers\.question: .*gone\.txt: cannot be read as UTF-8 text .*name a text file"):
        start(str(tmp_path / "gone.txt"))
    (tmp_path / "latin.txt").write_bytes(b"O\xf9 ?")
    with pytest.raises(ConfigError, match=r"intervene\.answers\.question: .*latin\.txt: cannot be read as UTF-8 text"):
        start(str(tmp_path / "latin.txt"))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ConfigError, match=r"intervene\.answers\.question: the file .*empty\.txt is empty; write a question"):
        start(str(tmp_path / "empty.txt"))
    assert read_question("Which animal is this?") == "Which animal is this?"


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("tokenizer.json", r"missing in this folder: a tokenizer"),
        ("chat_template.jinja", r"the folder has no chat template"),
        ("config.json", r"its weights are quantised \(gptq"),
    ],
)
def test_a_folder_that_cannot_answer_is_an_error_and_leaves_nothing(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, says: str
) -> None:
    folder = Path(shutil.copytree(study.model, tmp_path / "model"))
    if file == "config.json":
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    else:
        (folder / file).unlink()
    monkeypatch.setitem(study.line["extract"].manifest.params["model"], "path", str(folder))
    with pytest.raises(ModelError, match=says):
        run(study, tmp_path)
    assert not (tmp_path / "effects").exists()


def test_a_model_that_does_not_fit_is_refused_with_sizes_before_it_is_loaded(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speaking, "free_memory", lambda device: 1000)
    monkeypatch.setattr(speaking.hub, "load_weights", None)
    with pytest.raises(ModelError, match=r"the weights take 2\.65e-05 GB in float32, but only 1e-06 GB are free in main memory"):
        run(study, tmp_path)


def test_a_model_without_a_language_model_is_refused(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(study.line["extract"].manifest.params, "model", {"kind": "clip"})
    monkeypatch.setattr(answers, "Subject", lambda inputs: type("Towers", (), {"inputs": inputs, "device": "cpu"})())
    with pytest.raises(ModelError, match="clip models have no language model and cannot answer in words"):
        run(study, tmp_path)


def test_a_label_that_the_tokenizer_does_not_know_leaves_its_latent_untested(study: Study, tmp_path: Path, monkeypatch: Any) -> None:
    def unknown(self: Any, word: str) -> list[int]:
        raise InputError(f"the tokenizer does not know the word {word!r}")

    values = {"latents": {"kind": "listed", "latents": [*PLANTED, *UNLABELLED]}}
    beginnings = LlavaSpeaker.beginnings
    monkeypatch.setattr(LlavaSpeaker, "beginnings", lambda self, word: (unknown if word == "grid" else beginnings)(self, word))
    made = run(study, tmp_path, **values)
    reasons = {row["latent"]: row["reason"] for row in made.read("effects").to_pylist()}
    grid, fur = PLANTED
    assert reasons[grid] == "the tokenizer does not know the word 'grid'" and reasons[fur] is None
    assert {reasons[latent] for latent in UNLABELLED} == {"it has no label that an answer could say"}
    assert {row["latent"] for row in made.read("interventions").to_pylist()} == {fur}


def test_empty_answers_say_no_label_and_the_same_answer_about_all_images_tests_nothing(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    say = LlavaSpeaker._say
    monkeypatch.setattr(LlavaSpeaker, "_say", lambda self, inputs, n: Said(("",) * len(inputs["input_ids"]), say(self, inputs, n).log_p))
    rows = run(study, tmp_path).read("interventions").to_pylist()
    assert {row["value"] for row in rows if row["outcome"].endswith("says_label")} == {0.0}

    def the_same(self: Any, inputs: Mapping[str, torch.Tensor], n: int) -> Said:
        said = say(self, inputs, n)
        return Said(said.answers, torch.zeros_like(said.log_p).log_softmax(1))

    monkeypatch.setattr(LlavaSpeaker, "_say", the_same)
    shutil.rmtree(tmp_path / "effects", ignore_errors=True)
    made = run(study, tmp_path)
    assert re.match(r".* answers the same about all images, so no drift can be measured; ask another question", made.summary["reason"])


def test_progress_covers_all_images(study: Study, tmp_path: Path) -> None:
    events: list[Event] = []
    values = study.params.intervene.model_dump(mode="json") | {"n_images": 16, "draws": 3, "latents": {"kind": "listed", "latents": [3]}}
    values["answers"] |= {"joint": None, "batch": 10}
    with store.open_draft(tmp_path / "effects", "effects", {}, {}) as draft:
        intervene(type(study.params.intervene).model_validate(values), study.line, draft, events.append)
    done = [(event.done, event.total) for event in events if isinstance(event, Progress) and event.what == "ask about images"]
    assert done == [(10, 16), (16, 16)]


@pytest.mark.parametrize(
    ("label", "word"), [("Grid", "grid"), ("a striped cat", "striped"), ("the", "the"), ('"Sea lion"', "sea"), ("An  owl.", "owl")]
)
def test_the_word_of_a_label_is_its_first_that_is_no_article(label: str, word: str) -> None:
    assert find_word(label) == word == first_word(label).casefold()


@pytest.mark.parametrize(
    ("answer", "word"), [("Dog.", "Dog"), (' "sea lion"', "sea"), ("- a-b, c", "a-b"), ("A dog", "dog"), ("", ""), (" . ", "")]
)
def test_the_first_word_has_no_punctuation_around_it(answer: str, word: str) -> None:
    assert first_word(answer) == word


def test_a_label_without_a_word_is_refused() -> None:
    with pytest.raises(InputError, match=r"the label '\?!' has no word that an answer could begin with"):
        find_word("?!")
