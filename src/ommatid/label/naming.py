"""What each labeller says of the latents of an SAE."""

import json
import os
import zlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar, assert_never

import numpy as np

from ommatid.events import Progress, Warned
from ommatid.label.evidence.context import Context
from ommatid.label.evidence.images import Cases, iter_looks
from ommatid.label.labellers import Asked, People, Source, Words
from ommatid.label.labellers.base import Answer, Case
from ommatid.label.labellers.vocabulary import choose

BLOCK = 16
"""Answers that a power cut may cost, at most: so many are synced at a time."""
TO_ASK_AGAIN = ("failed", "over_budget")
"""Statuses that may be others the next time."""

Item = TypeVar("Item")
Said = TypeVar("Said")


def ask_each(ask: Callable[[Item], Said], items: Iterator[tuple[int, Item]], concurrency: int = 1) -> Iterator[tuple[int, Said]]:
    """Yield latents and what is said of their items, in order, holding few of them in memory at a time."""
    waiting: deque[tuple[int, Future[Said]]] = deque()
    with ThreadPoolExecutor(concurrency) as pool:
        for latent, item in items:
            waiting.append((latent, pool.submit(ask, item)))
            if len(waiting) > concurrency:
                yield _first(waiting)
        while waiting:
            yield _first(waiting)


def _first(waiting: "deque[tuple[int, Future[Said]]]") -> tuple[int, Said]:
    latent, future = waiting.popleft()
    return latent, future.result()


class Kept:
    """Answers of one labeller about one SAE, a line of JSON and its CRC-32 each: a run that was killed goes on without asking again."""

    def __init__(self, path: Path) -> None:
        self.answers: dict[int, Answer] = {}
        """By latent, of runs before; without those that failed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        self._file.truncate(self._load())
        self._n_new = 0

    def add(self, latent: int, answer: Answer) -> None:
        """Keep an answer."""
        text = json.dumps({"latent": latent, **asdict(answer)}).encode()
        self._file.write(text + b"\t%08x\n" % zlib.crc32(text))
        self._file.flush()  # a process that is killed then loses nothing
        self._n_new += 1
        if self._n_new % BLOCK == 0:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync what is left."""
        os.fsync(self._file.fileno())
        self._file.close()

    def _load(self) -> int:
        """Read what is whole, and give its bytes: a process that was killed may have left half a line, and a line may be damaged."""
        self._file.seek(0)
        n_bytes = 0
        for line in self._file:
            text, _, checksum = line.rpartition(b"\t")
            if checksum != b"%08x\n" % zlib.crc32(text):
                break
            values = json.loads(text)
            latent, answer = values.pop("latent"), Answer(**values)
            if answer.status not in TO_ASK_AGAIN:
                self.answers[latent] = answer
            n_bytes += len(line)
        return n_bytes


Answers = Mapping[int, Answer]
"""By latent; one that is not there gets no row."""


def find_names(context: Context) -> dict[str, Answers]:
    """Answers by labeller, in the order of label.labellers; says where a labeller failed."""
    answers = {}
    for name, source in context.material.sources.items():
        answers[name] = dict(sorted((latent, _checked(answer)) for latent, answer in _answer(context, name, source)))
        _warn_of_failures(context, name, answers[name])
    return answers


def _answer(context: Context, name: str, source: Source) -> Iterator[tuple[int, Answer]]:
    match source:
        case People():
            for latent, label in source.labels[context.sae].items():
                yield latent, Answer("ok", label)
        case Words():
            yield from _without_examples(context)
            yield from _choose(context, source)
        case Asked():
            yield from _without_examples(context)
            yield from _ask(context, name, source)
        case _:
            assert_never(source)


def _without_examples(context: Context) -> Iterator[tuple[int, Answer]]:
    for latent in range(context.d_sae):
        if latent not in context.gathered.strongest:
            yield latent, Answer("too_few_examples")


def _choose(context: Context, source: Words) -> Iterator[tuple[int, Answer]]:
    found, texts = context.gathered.strongest, context.material.texts
    has_all = len(source.words) == len(texts.words)
    embeddings = texts.embeddings if has_all else texts.embeddings[texts.rows(source.words)]
    rows, acts = [one.rows for one in found.values()], [one.acts for one in found.values()]
    places = choose(source.by, rows, acts, context.material.images, embeddings)
    for latent, place in zip(found, places.tolist(), strict=True):
        yield latent, Answer("ok", source.words[place])


def _ask(context: Context, name: str, source: Asked) -> Iterator[tuple[int, Answer]]:
    strongest = context.gathered.strongest
    with closing(Kept(context.draft.scratch / f"answers-{context.sae}-{name}.jsonl")) as kept:
        yield from kept.answers.items()
        cases = ((case.latent, case) for case in iter_cases(context, strongest.keys() - kept.answers.keys()))
        said = ask_each(source.labeller.answer, cases, source.concurrency)
        for done, (latent, answer) in enumerate(said, start=len(kept.answers) + 1):
            kept.add(latent, answer)
            yield latent, answer
            context.on_event(Progress(f"ask {name}", done, len(strongest)))


def iter_cases(context: Context, wanted: Collection[int]) -> Iterator[Case]:
    """The cases of some latents, in order."""
    if not wanted:
        return
    halves = context.material.halves
    cases = Cases(context.spool(), halves, context.gathered, context.params)
    for case in cases.iter_cases(context.iter_fired(), iter_looks(context.inputs["evaluate"]), wanted):
        images = np.array([example.image for example in (*case.firing, *case.silent)], dtype=np.int64)
        context.has_named[halves.rows_of(images)] = True
        yield case


def _checked(answer: Answer) -> Answer:
    """Whatever a labeller says: there is a label where the status is ok, and nowhere else."""
    label = (answer.label or "").strip()
    if answer.status == "ok":
        return replace(answer, label=label) if label else replace(answer, status="unparsed", label=None)
    return replace(answer, label=None)


def _warn_of_failures(context: Context, name: str, answers: Answers) -> None:
    failed = [answer for answer in answers.values() if answer.status not in ("ok", "too_few_examples")]
    if failed:
        counted = ", ".join(f"{n} {status}" for status, n in Counter(answer.status for answer in failed).items())
        ((detail, _),) = Counter(answer.detail for answer in failed).most_common(1)
        why = f"; most often: {detail}" if detail else ""
        context.on_event(
            Warned(f"{context.sae}: {name} has no name for {len(failed)} of {len(answers)} latents: {counted}{why}; names by others stay")
        )
