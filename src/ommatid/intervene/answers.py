"""What a model that answers in words says while latents of its vision tower are set, beside controls.

The whole LLaVA or Qwen-VL is asked one question about each image. The blocks of its tower before the hookpoint run once for a batch of
images; what follows, and the language model, run once for each latent, dose and arm.

Suffixes: n images, b images of a batch, a arms, p doses, v tokens of the vocabulary.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from string import punctuation, whitespace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64
from PIL import Image
from pydantic import TypeAdapter
from torch import Tensor

from ommatid.config import InterveneParams, Model
from ommatid.config.intervene import AnswersParams, find_prompt_file
from ommatid.config.models import LlavaModel, QwenModel
from ommatid.errors import ArtefactError, InputError
from ommatid.events import Listener, Progress, Warned
from ommatid.images.decode import Unreadable, decode
from ommatid.images.original import OriginalReader
from ommatid.intervene.arms import Controls, make_arms
from ommatid.intervene.edit import Edit, Editor
from ommatid.intervene.latent_test import ArmsTest
from ommatid.intervene.measure import Measured, choose_latents, share_of_random, untested_row
from ommatid.intervene.steering import ArmKey, Edited, Plan, describe_edit, list_warnings, unexplained
from ommatid.intervene.study import Study
from ommatid.intervene.subject import Described, Subject
from ommatid.metrics import Interval, answer_shift, bootstrap_mean, log_odds, wilson
from ommatid.metrics.interventions import CausalStatus
from ommatid.store import Artefact
from ommatid.vlm import load_model
from ommatid.vlm.speaking import Asked, DeviceMap, Said, Speaker, SpeakerDtype, check_speaks, load_speaker, read_prompt
from ommatid.vlm.steering_score import DOSE, score_steering

KEY = "intervene.answers"
OUTCOME = "word_log_odds"
"""Outcome that decides the status."""
PROMPT = "This image shows: {label}. {question}"
"""The question in the arm `prompt`, which says the label instead of editing anything."""
N_STRONGEST = 16
"""Number of the latent's strongest images, on which setting it should change nothing, and with which the steering score compares words."""
GREY = 128
"""Value of all pixels of the neutral image."""
SIDE = 224
"""Height and width of the neutral image in pixels, before preprocessing."""
ARTICLES = frozenset({"a", "an", "the"})
"""Words before the first word of a label that do not count."""


def read_question(question: str, key: str = f"{KEY}.question") -> str:
    """Return a question, or the text of the file that it names.

    Args:
        question: The question, or the path of a text file whose name ends in .txt.
        key: What it is called in messages.

    Raises:
        ConfigError: It is empty, or the file cannot be read as UTF-8 text.
    """
    return read_prompt(find_prompt_file(question) or question, key)


def measure_answers(params: InterveneParams, inputs: Mapping[str, Artefact], on_event: Listener) -> Measured:
    """Ask a model about evaluation images with latents of one SAE set to chosen activations.

    Args:
        params: The section `intervene`, with `answers`.
        inputs: As for `measure`.
        on_event: Called with each progress event and warning.

    Returns:
        What was measured, without attributions.

    Raises:
        ConfigError: The question is empty or cannot be read, or names the token of the image.
        InputError: No latent can be tested.
        ModelError: The model cannot be loaded, does not fit into memory, or does not depend on the hookpoint.
    """
    assert params.answers is not None, "there is no question"
    study = Study(params, Subject(inputs))
    return _Questioning(study, params.answers).run(on_event)


def open_speaker(subject: Subject, dtype: SpeakerDtype = "auto", device_map: DeviceMap | None = None) -> Speaker:
    """Load the whole model of which a study explains the tower.

    Args:
        subject: The study's tower.
        dtype: Data type of all weights; `auto` is bfloat16 if the hardware computes in it, and float32 otherwise.
        device_map: Devices of the sub-modules, as for `load_speaker`.

    Raises:
        ModelError: The model does not answer in words, cannot be loaded, or does not fit into memory.
    """
    return load_speaker(find_speaker(subject), dtype, subject.device, device_map)


def find_speaker(subject: Subject) -> LlavaModel | QwenModel:
    """Return the section of the model of which a study explains the tower.

    Raises:
        ModelError: The model does not answer in words.
    """
    return check_speaks(TypeAdapter(Model).validate_python(subject.inputs["extract"].manifest.params["model"]))


class _Questioning:
    """One question about the images of a study, asked in all arms of all chosen latents."""

    def __init__(self, study: Study, answers: AnswersParams) -> None:
        self.study, self.answers = study, answers
        self.speaker = open_speaker(study.subject, answers.dtype, answers.device_map)
        self.question = self.speaker.check_question(read_question(answers.question))
        self.originals = OriginalReader(study.subject.inputs["images"])

    def run(self, on_event: Listener) -> Measured:
        """Measure all chosen latents."""
        chosen, untested = choose_latents(self.study, self.study.subject.labels.__contains__, on_event)
        tests: list[AnswerTest] = []
        for one in chosen:
            try:
                tests.append(AnswerTest(self.study, one, self.question, self.speaker))
            except InputError as error:  # about this latent alone, such as a label that the tokenizer does not know
                untested.append(untested_row(one.latent, str(error)))
        if not tests:
            raise InputError(untested[0]["reason"] if untested else "no latent can be edited; choose others with intervene.latents")
        spread = self._ask_all(tests, on_event)
        if not spread:
            raise InputError(f"{self.speaker.name} answers the same about all images, so no drift can be measured; ask another question")
        found = [test.finish(spread) for test in tests]
        return Measured(
            interventions=[*(row for one in found for row in one.interventions), *self._score(tests, on_event)],
            effects=[*(one.effect for one in found), *untested],
            attributions=[],
            zero_dose=max(test.zero_dose for test in tests),
            random_causal=share_of_random([one.random_status for one in found]),
        )

    def _ask_all(self, tests: "Sequence[AnswerTest]", on_event: Listener) -> float:
        """Ask about all images; return the mean divergence of the plain answers about two different ones."""
        images, n, size = self.study.images, len(self.study.images), self.answers.batch
        spreads: list[Tensor] = []
        for start in range(0, n, size):
            with self._asking(self._open(images[start : start + size])) as asked:
                for place, test in enumerate(tests, start=1):
                    test.ask(asked)
                    done = min(start + size, n)
                    on_event(Progress("ask about images", done - (done - start) * (len(tests) - place) // len(tests), n))
                log_p = asked.plain.log_p
                if len(log_p) > 1:
                    spreads.append(answer_shift(log_p, log_p.roll(1, 0)).cpu())
        with self._asking([Image.new("RGB", (SIDE, SIDE), (GREY,) * 3)]) as asked:
            for test in tests:
                test.ask_about_grey(asked)
        strongest = _find_strongest(self.study.subject)
        for place, test in enumerate(tests, start=1):
            numbers = strongest[test.chosen.latent]
            for start in range(0, len(numbers), size):
                with self._asking(self._open(numbers[start : start + size])) as asked:
                    test.ask_about_strongest(asked)
            on_event(Progress("ask about strongest images", place, len(tests)))
        return float(torch.cat(spreads).mean())

    def _asking(self, images: Sequence[Image.Image]) -> Any:
        subject, n = self.study.subject, self.answers.max_new_tokens
        return self.speaker.asking(images, subject.writes.name, self.question, n, subject.reads.name)

    def _open(self, numbers: Sequence[int]) -> list[Image.Image]:
        """Decode images of the study, by their numbers."""
        return list(map(self._decode, numbers))

    def _decode(self, number: int) -> Image.Image:
        try:
            return decode(self.originals.read(number))
        except Unreadable as error:
            raise ArtefactError(f"images: image {number} cannot be decoded any more ({error}); run the stage images again") from None

    def _score(self, tests: "Sequence[AnswerTest]", on_event: Listener) -> Iterator[dict[str, Any]]:
        """Iterate over rows of the steering score of Pach et al., if there is a joint model and an SAE that decodes what it encodes."""
        subject, joint_params = self.study.subject, self.answers.joint
        if joint_params is None:
            return
        if subject.sae.config.target is not None:
            on_event(Warned(f"{subject.sae.name}: no steering score: it is defined for an autoencoder, and this SAE is a transcoder"))
            return
        joint = load_model(joint_params, "auto", subject.device)
        strongest, means = _find_strongest(subject), []
        for test in tests:
            pixels = np.stack([joint.preprocess(image) for image in self._open(strongest[test.chosen.latent])])
            embedding = joint.capture(torch.from_numpy(pixels).to(subject.device), ()).embedding
            assert embedding is not None, joint.name
            means.append(embedding.float().mean(0, keepdim=True))
        latents = [test.chosen.latent for test in tests]
        images = _Lazy(self, self.study.images)
        score = score_steering(self.speaker, subject.device_sae, latents, images, joint, torch.stack(means), batch=self.answers.batch)
        for place, test in enumerate(tests):
            for arm, values in score.scores.items():
                said = values[place][~values[place].isnan()].double()
                if len(said):
                    dose = DOSE / test.chosen.scale if arm == "targeted" else 0.0
                    yield test.make_row("steering_score", arm, dose, bootstrap_mean(said), len(said), 1)


class _Lazy(Sequence[Image.Image]):
    """Images of a study, decoded when they are asked for."""

    def __init__(self, of: _Questioning, numbers: Sequence[int]) -> None:
        self._of, self._numbers = of, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, part: Any) -> Any:
        return self._of._open(self._numbers[part]) if isinstance(part, slice) else self._of._decode(self._numbers[part])


def _find_strongest(subject: Subject) -> dict[int, list[int]]:
    """Return the numbers of each latent's strongest evaluation images, the strongest first."""
    rows = subject.inputs["evaluate"].read("examples", ["latent", "decile", "rank", "image"]).to_pylist()
    found: dict[int, list[int]] = {}
    for row in sorted(rows, key=lambda row: (row["latent"], -row["decile"], row["rank"])):
        found.setdefault(row["latent"], []).append(row["image"])
    return {latent: images[:N_STRONGEST] for latent, images in found.items()}


@dataclass(frozen=True)
class FoundAnswers:
    """What was found of one latent."""

    effect: dict[str, Any]
    """Its row of the table `effects`."""
    interventions: list[dict[str, Any]]
    """Its rows of the table `interventions`."""
    random_status: CausalStatus
    """Status that the same rule gives a random latent in its place."""


class _Tally:
    """What the answers in each arm say, by arm and image: `none` first, then the arms of the edit, and `prompt` last."""

    def __init__(self) -> None:
        self.shifts: list[Float64[Tensor, "arms batch"]] = []
        """Divergence of the next-token distribution from that of the plain model, in nats."""
        self.log_odds: list[Float64[Tensor, "arms batch"]] = []
        """Log-odds of the word, in nats."""
        self.says: list[Bool[Tensor, "arms batch"]] = []
        """Whether the first word of the answer is the word."""


class AnswerTest(ArmsTest):
    """The arms of one latent, and what the model says in them.

    Args:
        study: The study.
        chosen: The latent.
        question: The question.
        speaker: The model.

    Raises:
        InputError: As for `ArmsTest`; or there is no label, or it has no word, or none that the tokenizer knows.
    """

    def __init__(self, study: Study, chosen: Described, question: str, speaker: Speaker) -> None:
        super().__init__(study, chosen, OUTCOME)
        if chosen.label is None:
            raise InputError("it has no label that an answer could say")
        self.word = find_word(chosen.label)
        self.tokens = torch.tensor(speaker.beginnings(self.word))
        self.prompt = PROMPT.format(label=chosen.label, question=question)
        self.real, self.grey = _Tally(), _Tally()
        self.drift: list[Float64[Tensor, "doses batch"]] = []
        """Divergence on the latent's strongest images under the edit at each dose."""
        self.random_drift: list[Float64[Tensor, "doses batch"]] = []
        """The same under the first random latent."""

    def ask(self, asked: Asked) -> None:
        """Ask about a batch of images in all arms."""
        fires_v = (self.editor.read(asked.tokens).acts[..., 0] > 0).any(1).cpu()
        self.fires.append(torch.stack([views.any() for views in fires_v.split(list(asked.n_views))]))
        unmoved = self._ask_arms(asked, self.real)
        self.editor.forget()
        self.zero_dose = max(self.zero_dose, float((unmoved.log_p - asked.plain.log_p).abs().max()))

    def ask_about_grey(self, asked: Asked) -> None:
        """Ask about the neutral image in all arms."""
        self._ask_arms(asked, self.grey)
        self.editor.forget()

    def ask_about_strongest(self, asked: Asked) -> None:
        """Ask about the latent's strongest images under the edit and under the first random latent."""
        arms, _ = self._make_arms(asked.tokens)
        shifts = {name: [] for name in ("targeted", "random_latent")}
        for arm in arms:
            if arm.name in shifts and arm.draw == 0:
                shifts[arm.name].append(answer_shift(asked.plain.log_p, asked.again(arm.replacement, None).log_p).cpu())
        self.editor.forget()
        self.drift.append(torch.stack(shifts["targeted"]))
        self.random_drift.append(torch.stack(shifts["random_latent"]))

    def _ask_arms(self, asked: Asked, tally: _Tally) -> Said:
        """Ask in all arms, and once with an edit that moves nothing, whose answers are returned."""
        arms, zero = self._make_arms(asked.tokens)
        found: list[tuple[Tensor, Tensor, Tensor]] = [self._look_at(asked.plain, asked.plain)]
        found += [self._look_at(asked.plain, asked.again(arm.replacement, None)) for arm in arms[1:]]
        found.append(self._look_at(asked.plain, asked.again(None, self.prompt)))
        for values, of_arms in zip((tally.shifts, tally.log_odds, tally.says), zip(*found, strict=True), strict=True):
            values.append(torch.stack(of_arms))
        return asked.again(zero, None)

    def _look_at(self, plain: Said, said: Said) -> tuple[Tensor, Tensor, Tensor]:
        """Return shift, log-odds of the word and whether it is said, `(b,)` each."""
        says = torch.tensor([first_word(answer).casefold() == self.word for answer in said.answers])
        return answer_shift(plain.log_p, said.log_p).cpu(), log_odds(said.log_p, self.tokens).cpu(), says

    def finish(self, spread: float) -> FoundAnswers:
        """Compute the outcomes and the status.

        Args:
            spread: Mean divergence of the plain answers about two different images, in which drift is measured.
        """
        odds_an = torch.cat(self.real.log_odds, 1)
        drift_p, random_drift_p = (torch.cat(of_arm, 1).mean(1) / spread for of_arm in (self.drift, self.random_drift))
        for drift in (drift_p, random_drift_p):
            # To remove a latent changes nothing where it is silent, and should change what is said of its own images.
            drift[[place for place, dose in enumerate(self.doses) if dose == 0]] = 0.0
        effect, random_status = self._judge(odds_an[1:-1] - odds_an[0], drift_p, random_drift_p)
        drifts = zip(self.doses, (torch.cat(self.drift, 1) / spread), strict=True)
        rows = [
            *self._rows_of("", self.real),
            *self._rows_of("grey_", self.grey),
            *(self.make_row("answer_drift", "targeted", dose, bootstrap_mean(of), len(of), 1) for dose, of in drifts if dose),
        ]
        return FoundAnswers(effect, rows, random_status)

    def _rows_of(self, prefix: str, tally: _Tally) -> Iterator[dict[str, Any]]:
        """Iterate over the rows of the outcomes on real images, or on the neutral one."""
        shifts, odds, says = (torch.cat(values, 1) for values in (tally.shifts, tally.log_odds, tally.says))
        arms = [("none", 0.0, [0]), *((name, dose, [1 + i for i in places]) for name, dose, places in self._each())]
        for name, dose, places in [*arms, ("prompt", 0.0, [len(odds) - 1])]:
            n, n_draws, share = odds.shape[1], len(places), float(says[places].double().mean())
            yield self.make_row(f"{prefix}says_label", name, dose, _spread_of(share, n), n, n_draws)
            if name != "none":
                for outcome, values in ((OUTCOME, odds[places] - odds[0]), ("answer_shift", shifts[places])):
                    mean = values.mean(0)
                    found = bootstrap_mean(mean) if n > 1 else Interval(float(mean), math.nan, math.nan)
                    yield self.make_row(f"{prefix}{outcome}", name, dose, found, n, n_draws)

    def make_row(self, outcome: str, arm: str, dose: float, found: Interval, n: int, n_draws: int) -> dict[str, Any]:
        """Make a row of the table `interventions`."""
        return self._row(outcome, arm, dose, found, n, n_draws)


# Given images


@dataclass(frozen=True, eq=False, kw_only=True)
class Answered(Edited):
    """What a model says of some images under every arm and dose; the last arm is `prompt`, if the latents have labels."""

    question: str
    """The question."""
    words: tuple[str, ...]
    """First words of the latents' labels, of which `log_odds_ab` are; () if the latents have none that the tokenizer knows."""
    answers: tuple[tuple[str, ...], ...]
    """Answer by arm and image; "" if the model ends it at once."""
    shifts_ab: Float64[Tensor, "arms images"]
    """Kullback-Leibler divergence of the first token of the answer from that of the unchanged model, in nats, `(a, b)`."""
    log_odds_ab: Float64[Tensor, "arms images"]
    """Log-odds that the answer begins with one of the words, `(a, b)`; NaN if there are no words."""

    def table(self) -> list[dict[str, Any]]:
        """Return plain rows for each image, arm, dose and draw.

        Returns:
            Rows with the columns `image` (its number), `arm`, `dose` (None for `none`, `untouched` and `prompt`), `draw`, `answer`, `shift`
            and `log_odds`, and `answer_before` and `log_odds_before` of the plain model. Log-odds are None if there are no words.
        """
        odds = [[None if math.isnan(value) else value for value in row] for row in self.log_odds_ab.tolist()]
        return [
            {
                "image": image, "arm": key.name, "dose": key.dose, "draw": key.draw, "answer": self.answers[place][image],
                "shift": float(self.shifts_ab[place, image]), "log_odds": odds[place][image],
                "answer_before": self.answers[0][image], "log_odds_before": odds[0][image],
            }
            for image in range(len(self.answers[0]))
            for place, key in enumerate(self.arms)
        ]  # fmt: skip


def ask(
    subject: Subject,
    speaker: Speaker,
    images: Sequence[Image.Image],
    described: Sequence[Described],
    plan: Plan,
    question: str,
    max_new_tokens: int,
) -> Answered:
    """Ask a model a question about images with latents of its tower edited at several doses, beside every control.

    Args:
        subject: The tower and the SAE.
        speaker: The whole model, from `open_speaker`.
        images: The images.
        described: The latents that are edited together, from `Subject.describe`.
        plan: The doses, and how they are given. A mask is spread over the views that LLaVA-NeXT has of an image.
        question: The question, or the path of a text file that holds it and whose name ends in .txt.
        max_new_tokens: Largest number of tokens in an answer.

    Raises:
        ConfigError: The question is empty or cannot be read, or names the token of the image; or `max_new_tokens` is below 1.
        InputError: As for `steer`.
        ModelError: The model does not depend on the hookpoint, or an edit is too large for its data type.
    """
    batches, asked_for = plan.batches(len(images)), speaker.check_question(read_question(question, "question"))
    editor, controls = subject.editor(described), subject.controls(described, plan.seed, plan.draws)
    words, known = _find_words(described, speaker)
    labels = [one.label for one in described if one.label is not None]
    prompt = PROMPT.format(label=" and ".join(labels), question=asked_for) if labels else None
    parts: list[_Part] = []
    for batch, tokens in batches:
        where = _spread(tokens, subject, speaker, images[batch]) if isinstance(tokens, Tensor) else tokens
        with speaker.asking(images[batch], subject.writes.name, asked_for, max_new_tokens, subject.reads.name) as asked:
            parts.append(_ask_batch(subject, editor, controls, plan.edits(described, where), asked, prompt, known))
    answered = Answered(
        **describe_edit(subject, described, plan),
        arms=parts[0].arms,
        acts_bkl=torch.cat([part.acts_bkl for part in parts]),
        fvu_b=torch.cat([part.fvu_b for part in parts]),
        question=asked_for,
        words=words,
        answers=tuple(tuple(answer for part in parts for answer in part.answers[place]) for place in range(len(parts[0].arms))),
        shifts_ab=torch.cat([part.shifts_ab for part in parts], 1),
        log_odds_ab=torch.cat([part.log_odds_ab for part in parts], 1),
    )
    return replace(answered, warnings=tuple(list_warnings(subject, answered)))


@dataclass(frozen=True, eq=False)
class _Part:
    """Results of one batch, as in `Answered`."""

    arms: tuple[ArmKey, ...]
    answers: tuple[tuple[str, ...], ...]
    shifts_ab: Float64[Tensor, "arms batch"]
    log_odds_ab: Float64[Tensor, "arms batch"]
    acts_bkl: Float32[Tensor, "batch kept edited"]
    fvu_b: Float64[Tensor, " batch"]


def _ask_batch(
    subject: Subject,
    editor: Editor,
    controls: Controls,
    edits: Sequence[Edit],
    asked: Asked,
    prompt: str | None,
    known: Sequence[int],
) -> _Part:
    """Ask in all arms of edits about a batch of images."""
    codes = editor.read(asked.tokens, reconstruct=True)
    x: list[Tensor] = []

    def as_it_is(tokens: Tensor) -> Tensor:
        x.append(subject.writes.pick(tokens).float())
        return tokens

    none, *others = make_arms(editor, edits, controls, codes)
    keys = [ArmKey(arm.name, arm.edit and arm.edit.dose, arm.draw) for arm in (none, *others)]
    said = [asked.again(as_it_is, None), *(asked.again(arm.replacement, None) for arm in others)]
    if prompt is not None:
        keys.append(ArmKey("prompt", None, 0))
        said.append(asked.again(None, prompt))
    # The base view of each image stands for it: it is the one on which the SAE was trained.
    base = torch.tensor(asked.n_views).cumsum(0) - torch.tensor(asked.n_views)
    chosen = editor.chosen(edits[0].tokens, codes.acts)
    fvu = unexplained(x[0], codes.reconstruction, chosen, subject.mean.to(x[0].device))
    odds = torch.tensor(known, dtype=torch.int64)
    return _Part(
        tuple(keys),
        tuple(one.answers for one in said),
        torch.stack([answer_shift(asked.plain.log_p, one.log_p).cpu() for one in said]),
        torch.stack([log_odds(one.log_p, odds).cpu() if known else torch.full((len(one.answers),), math.nan).double() for one in said]),
        codes.acts.cpu()[base],
        fvu.cpu()[base],
    )


def _find_words(described: Sequence[Described], speaker: Speaker) -> tuple[tuple[str, ...], list[int]]:
    """Return the first words of the labels that the tokenizer knows, and the tokens with which they begin."""
    words, tokens = [], set[int]()
    for one in described:
        with suppress(InputError):  # such as a label without a word; the answers can be read without it
            word = find_word(one.label or "")
            tokens |= set(speaker.beginnings(word))
            words.append(word)
    return tuple(dict.fromkeys(words)), sorted(tokens)


def _spread(
    mask: Bool[Tensor, "*batch kept"], subject: Subject, speaker: Speaker, images: Sequence[Image.Image]
) -> Bool[Tensor, "views kept"]:
    """Turn the mask of the kept tokens of images, or one for each, into masks of those of their views."""
    rows = mask.expand(len(images), -1)
    grid = subject.writes.grid
    n_patches = 0 if grid is None else grid[0] * grid[1]
    others, patches = rows[:, : rows.shape[1] - n_patches], rows[:, rows.shape[1] - n_patches :]
    n_views = torch.tensor(speaker.count_views(images))
    if grid is None:
        return others.repeat_interleave(n_views, 0)
    spread = speaker.spread_masks(images, patches.unflatten(1, grid)).flatten(1)
    return torch.cat([others.repeat_interleave(n_views, 0), spread], 1)


def _spread_of(share: float, n: int) -> Interval:
    """Return a share of images with its interval; none for a single image."""
    return wilson(share, n) if n > 1 else Interval(share, math.nan, math.nan)


def find_word(label: str) -> str:
    """Return the first word of a label that is no article, without punctuation around it and without capitals.

    Raises:
        InputError: There is none.
    """
    words = [word for part in label.casefold().split() if (word := part.strip(punctuation + whitespace))]
    if not words:
        raise InputError(f"the label {label!r} has no word that an answer could begin with")
    return next((word for word in words if word not in ARTICLES), words[0])


def first_word(answer: str) -> str:
    """Return the first word of an answer that is no article, without punctuation around it; "" if there is none."""
    words = [word for part in answer.split() if (word := part.strip(punctuation + whitespace))]
    return next((word for word in words if word.casefold() not in ARTICLES), words[0] if words else "")
