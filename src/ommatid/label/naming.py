"""What each labeller says of the latents of an SAE."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import assert_never

import numpy as np

from ommatid.events import Progress, Warned
from ommatid.label.asked import Kept, ask_each
from ommatid.label.cases import Cases, iter_looks
from ommatid.label.labeller import Answer, Case
from ommatid.label.labellers import Asked, People, Source, Words
from ommatid.label.subject import Subject
from ommatid.label.vocabulary import choose

Answers = Mapping[int, Answer]
"""By latent; one that is not there gets no row."""


def find_names(subject: Subject) -> dict[str, Answers]:
    """Answers by labeller, in the order of label.labellers; says where a labeller failed."""
    answers = {}
    for name, source in subject.material.sources.items():
        answers[name] = dict(sorted((latent, _checked(answer)) for latent, answer in _answer(subject, name, source)))
        _warn_of_failures(subject, name, answers[name])
    return answers


def _answer(subject: Subject, name: str, source: Source) -> Iterator[tuple[int, Answer]]:
    match source:
        case People():
            for latent, label in source.labels[subject.sae].items():
                yield latent, Answer("ok", label)
        case Words():
            yield from _without_examples(subject)
            yield from _choose(subject, source)
        case Asked():
            yield from _without_examples(subject)
            yield from _ask(subject, name, source)
        case _:
            assert_never(source)


def _without_examples(subject: Subject) -> Iterator[tuple[int, Answer]]:
    for latent in range(subject.d_sae):
        if latent not in subject.gathered.strongest:
            yield latent, Answer("too_few_examples")


def _choose(subject: Subject, source: Words) -> Iterator[tuple[int, Answer]]:
    found, texts = subject.gathered.strongest, subject.material.texts
    has_all = len(source.words) == len(texts.words)
    embeddings = texts.embeddings if has_all else texts.embeddings[texts.rows(source.words)]
    rows, acts = [one.rows for one in found.values()], [one.acts for one in found.values()]
    places = choose(source.by, rows, acts, subject.material.images, embeddings)
    for latent, place in zip(found, places.tolist(), strict=True):
        yield latent, Answer("ok", source.words[place])


def _ask(subject: Subject, name: str, source: Asked) -> Iterator[tuple[int, Answer]]:
    strongest = subject.gathered.strongest
    with closing(Kept(subject.draft.scratch / f"answers-{subject.sae}-{name}.jsonl")) as kept:
        yield from kept.answers.items()
        cases = ((case.latent, case) for case in iter_cases(subject, strongest.keys() - kept.answers.keys()))
        said = ask_each(source.labeller.answer, cases, source.concurrency)
        for done, (latent, answer) in enumerate(said, start=len(kept.answers) + 1):
            kept.add(latent, answer)
            yield latent, answer
            subject.on_event(Progress(f"ask {name}", done, len(strongest)))


def iter_cases(subject: Subject, wanted: Collection[int]) -> Iterator[Case]:
    """The cases of some latents, in order."""
    if not wanted:
        return
    halves = subject.material.halves
    cases = Cases(subject.spool(), halves, subject.gathered, subject.params)
    for case in cases.iter_cases(subject.iter_fired(), iter_looks(subject.inputs["evaluate"]), wanted):
        images = np.array([example.image for example in (*case.firing, *case.silent)], dtype=np.int64)
        subject.has_named[halves.rows_of(images)] = True
        yield case


def _checked(answer: Answer) -> Answer:
    """Whatever a labeller says: there is a label where the status is ok, and nowhere else."""
    label = (answer.label or "").strip()
    if answer.status == "ok":
        return replace(answer, label=label) if label else replace(answer, status="unparsed", label=None)
    return replace(answer, label=None)


def _warn_of_failures(subject: Subject, name: str, answers: Answers) -> None:
    failed = [answer for answer in answers.values() if answer.status not in ("ok", "too_few_examples")]
    if failed:
        counted = ", ".join(f"{n} {status}" for status, n in Counter(answer.status for answer in failed).items())
        ((detail, _),) = Counter(answer.detail for answer in failed).most_common(1)
        why = f"; most often: {detail}" if detail else ""
        subject.on_event(
            Warned(f"{subject.sae}: {name} has no name for {len(failed)} of {len(answers)} latents: {counted}{why}; names by others stay")
        )
