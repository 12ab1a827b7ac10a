"""The table `labels`: the answer of each labeller about each latent of an SAE, with the scores of the labels, and its summary."""

import json
import os
import zlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar, assert_never

import numpy as np
import pyarrow as pa

from ommatid import schemas
from ommatid.events import Progress, Warned
from ommatid.images.eval_split import LatentFirings
from ommatid.label.context import Context
from ommatid.label.evidence import Cases, iter_looks
from ommatid.label.labellers import Asked, People, Source, Words
from ommatid.label.labellers.base import Answer, Case, Detector
from ommatid.label.labellers.vocabulary import choose, mean_direction
from ommatid.label.scoring import Controls, Scorer, Trial, draw_detection, grade
from ommatid.metrics import unit
from ommatid.summaries import LabelsSummary

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


Row = dict[str, Any]
"""Of the table, by column; what is not there is null."""


def make_table(context: Context, answers: Mapping[str, Answers]) -> pa.Table:
    """A row for each latent and labeller that says something of it, with the scores of the names."""
    rows: dict[str, dict[int, Row]] = {}
    for place, (name, said) in enumerate(answers.items(), start=1):
        same = {"sae": context.sae, "labeller": name, "place": place}
        columns = ("status", "label", "detail", "n_requests", "n_tokens")
        rows[name] = {i: {**same, "latent": i, **{key: getattr(answer, key) for key in columns}} for i, answer in said.items()}
    scorer = Scorer(context.material.images, context.material.halves, context.gathered, context.params.seed)
    _add_scores(context, scorer, rows)
    for name, source in context.material.sources.items():
        if isinstance(source, Asked) and source.detector:
            _detect(context, scorer, rows[name], name, source.detector, source.concurrency)
    ordered = sorted((row for of in rows.values() for row in of.values()), key=lambda row: (row["latent"], row["place"]))
    return pa.Table.from_pylist(ordered, schema=schemas.LABELS)


def _add_scores(context: Context, scorer: Scorer, rows: Mapping[str, dict[int, Row]]) -> None:
    """Fill in the scores of names by their places in the joint space."""
    strongest, texts = context.gathered.strongest, context.material.texts
    labels = {name: {i: row["label"] for i, row in of.items() if row["label"] is not None} for name, of in rows.items()}
    controls = Controls(labels, strongest.keys(), texts, context.d_sae, context.params.seed)
    for fired, trial in _iter_trials(context, scorer):
        images = strongest[fired.latent]
        direction = unit(mean_direction(context.material.images[images.rows], images.acts)[None])[0]
        for name, of in labels.items():
            if fired.latent in of:
                tried = controls.of(name, fired.latent)
                row = rows[name][fired.latent]
                row["similarity"] = float(direction @ tried.name.double())
                row |= scorer.score(trial, tried) if trial else {}
        context.on_event(Progress("score labels", fired.latent + 1, context.d_sae))


def _detect(context: Context, scorer: Scorer, rows: dict[int, Row], name: str, detector: Detector, concurrency: int) -> None:
    """Fill in the scores of a labeller's own second opinion on its names."""
    spool, n_firing = context.spool(), dict[int, int]()

    def questions() -> Iterator[tuple[int, tuple[str, tuple[bytes, ...]]]]:
        for fired, trial in _iter_trials(context, scorer):
            label = rows[fired.latent]["label"] if fired.latent in rows else None
            if trial and label is not None:
                drawn, n_firing[fired.latent] = draw_detection(trial.held_out)
                yield fired.latent, (label, tuple(spool.read(row)[0] for row in drawn.tolist()))

    for latent, grades in ask_each(lambda asked: detector.fires(*asked), questions(), concurrency):
        rows[latent] |= grade(grades, n_firing[latent]) if grades else {}
        context.on_event(Progress(f"detect by {name}", latent + 1, context.d_sae))


def _iter_trials(context: Context, scorer: Scorer) -> Iterator[tuple[LatentFirings, Trial | None]]:
    """The latents whose names are scored, in order, and on what."""
    for fired in context.iter_fired():
        if fired.latent in context.gathered.strongest:
            trial = scorer.draw(fired)
            if trial:
                context.has_named[trial.naming.rows] = True
                context.has_scored[trial.held_out.rows] = True
            yield fired, trial


MEANS = ("score", "auroc", "control_score", "random_score", "correlation", "control_correlation", "detector_score")
"""Columns of `labels` whose mean over the latents is told."""


def summarise(context: Context, table: pa.Table) -> LabelsSummary:
    """Return the summary of the labels; with several labellers it also has the numbers of each, as `<key>_<labeller>`."""
    rows = table.to_pylist()
    halves = context.material.halves
    by_labeller = {name: [row for row in rows if row["labeller"] == name] for name in context.material.sources}
    apart = {f"{key}_{name}": value for name, own in by_labeller.items() for key, value in _numbers(own).items()}
    return LabelsSummary(
        labellers=list(by_labeller),
        n_latents=context.d_sae,
        n_words=len(context.material.texts.words),
        n_naming_images=int((~halves.is_held_out).sum()),
        n_held_out_images=int(halves.is_held_out.sum()),
        n_images_in_both=int((context.has_named & context.has_scored).sum()),
        **_numbers(best_labels(rows)),
        **(apart if len(by_labeller) > 1 else {}),
        n_requests=sum(row["n_requests"] for row in rows),
        n_tokens=sum(row["n_tokens"] for row in rows),
    )


def best_labels(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each latent with a label the one that scores best; of equals the one whose labeller stands first (catalog/sql/features.sql)."""
    best: dict[int, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["place"]):
        if row["status"] == "ok" and (row["latent"] not in best or _score_of(row) > _score_of(best[row["latent"]])):
            best[row["latent"]] = row
    return list(best.values())


def _score_of(row: dict[str, Any]) -> float:
    return -1.0 if row["score"] is None else row["score"]


def _numbers(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of labels, at most one a latent."""
    return {
        "n_labelled": sum(row["status"] == "ok" for row in rows),
        "n_scored": sum(row["score"] is not None for row in rows),
        **{name: _mean(row[name] for row in rows) for name in MEANS},
        "beats_control": _share_above(rows, "control_score"),
        "beats_random": _share_above(rows, "random_score"),
    }


def _share_above(rows: Iterable[dict[str, Any]], control: str) -> float | None:
    """Share of the labels that score higher than that control, of those that have both scores; None: there are none."""
    return _mean(float(row["score"] > row[control]) for row in rows if row["score"] is not None and row[control] is not None)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
