"""The tables of one SAE: `labels` with every labeller's answer about each latent and its scores, and `mistakes`; and their summary."""

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
from ommatid.label.evidence import Cases, iter_heat_maps
from ommatid.label.labellers import HumanLabels, ImageLabeller, Source, WordList
from ommatid.label.labellers.base import Answer, Case, Detector
from ommatid.label.labellers.vocabulary import choose, mean_direction
from ommatid.label.scoring import MISTAKE, Controls, Scorer, Trial, draw_detection, grade
from ommatid.metrics import unit
from ommatid.summaries import LabelsSummary

BLOCK = 16
"""Number of answers after which the file is synced, and so the most that a power cut can lose."""
RETRIED = ("failed", "over_budget")
"""Statuses of answers that the next run asks for again."""

Item = TypeVar("Item")
Reply = TypeVar("Reply")


def ask_each(ask: Callable[[Item], Reply], items: Iterator[tuple[int, Item]], concurrency: int = 1) -> Iterator[tuple[int, Reply]]:
    """Call a function with the item of each latent, concurrently, holding few items in memory at a time.

    Args:
        ask: The function, called in threads.
        items: Latents and their items.
        concurrency: Number of threads.

    Yields:
        Latents and what the function returned, in order.
    """
    waiting: deque[tuple[int, Future[Reply]]] = deque()
    with ThreadPoolExecutor(concurrency) as pool:
        for latent, item in items:
            waiting.append((latent, pool.submit(ask, item)))
            if len(waiting) > concurrency:
                yield _first(waiting)
        while waiting:
            yield _first(waiting)


def _first(waiting: "deque[tuple[int, Future[Reply]]]") -> tuple[int, Reply]:
    latent, future = waiting.popleft()
    return latent, future.result()


class AnswerLog:
    """File of one labeller's answers about one SAE, from which a run that was killed continues without asking again.

    Each line is an answer as JSON, followed by its CRC-32.

    Args:
        path: The file, which is created if necessary.
    """

    def __init__(self, path: Path) -> None:
        self.answers: dict[int, Answer] = {}
        """Answers of earlier runs by latent, without those to ask for again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        self._file.truncate(self._load())
        self._n_new = 0

    def add(self, latent: int, answer: Answer) -> None:
        """Append an answer."""
        text = json.dumps({"latent": latent, **asdict(answer)}).encode()
        self._file.write(text + b"\t%08x\n" % zlib.crc32(text))
        self._file.flush()  # So that nothing is lost if the process is killed.
        self._n_new += 1
        if self._n_new % BLOCK == 0:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close the file."""
        os.fsync(self._file.fileno())
        self._file.close()

    def _load(self) -> int:
        """Read the answers up to the first damaged line, such as half a line left by a killed process, and return their size in bytes."""
        self._file.seek(0)
        n_bytes = 0
        for line in self._file:
            text, _, checksum = line.rpartition(b"\t")
            if checksum != b"%08x\n" % zlib.crc32(text):
                break
            values = json.loads(text)
            latent, answer = values.pop("latent"), Answer(**values)
            if answer.status not in RETRIED:
                self.answers[latent] = answer
            n_bytes += len(line)
        return n_bytes


Answers = Mapping[int, Answer]
"""Answers by latent; a latent without an answer gets no row."""


def find_answers(context: Context) -> dict[str, Answers]:
    """Return the answers of each labeller, in the order of label.labellers, and warn of labellers that failed."""
    answers = {}
    for name, source in context.material.sources.items():
        answers[name] = dict(sorted((latent, _normalise(answer)) for latent, answer in _answer(context, name, source)))
        _warn_of_failures(context, name, answers[name])
    return answers


def _answer(context: Context, name: str, source: Source) -> Iterator[tuple[int, Answer]]:
    """Yield one labeller's answers about the latents, in any order."""
    match source:
        case HumanLabels():
            for latent, label in source.labels[context.sae].items():
                yield latent, Answer("ok", label)
        case WordList():
            yield from _without_examples(context)
            yield from _choose_words(context, source)
        case ImageLabeller():
            yield from _without_examples(context)
            yield from _ask(context, name, source)
        case _:
            assert_never(source)


def _without_examples(context: Context) -> Iterator[tuple[int, Answer]]:
    for latent in range(context.d_sae):
        if latent not in context.evidence.strongest:
            yield latent, Answer("too_few_examples")


def _choose_words(context: Context, source: WordList) -> Iterator[tuple[int, Answer]]:
    strongest, texts = context.evidence.strongest, context.material.texts
    has_all = len(source.words) == len(texts.words)
    embeddings = texts.embeddings if has_all else texts.embeddings[texts.rows(source.words)]
    rows, acts = [images.rows for images in strongest.values()], [images.acts for images in strongest.values()]
    places = choose(source.by, rows, acts, context.material.images, embeddings)
    for latent, place in zip(strongest, places.tolist(), strict=True):
        yield latent, Answer("ok", source.words[place])


def _ask(context: Context, name: str, source: ImageLabeller) -> Iterator[tuple[int, Answer]]:
    strongest = context.evidence.strongest
    with closing(AnswerLog(context.draft.scratch / f"answers-{context.sae}-{name}.jsonl")) as log:
        yield from log.answers.items()
        cases = ((case.latent, case) for case in iter_cases(context, strongest.keys() - log.answers.keys()))
        answers = ask_each(source.labeller.answer, cases, source.concurrency)
        for done, (latent, answer) in enumerate(answers, start=len(log.answers) + 1):
            log.add(latent, answer)
            yield latent, answer
            context.on_event(Progress(f"ask {name}", done, len(strongest)))


def iter_cases(context: Context, wanted: Collection[int]) -> Iterator[Case]:
    """Iterate over the cases of some latents, in order, and record which images they show."""
    if not wanted:
        return
    split = context.material.split
    cases = Cases(context.spool(), split, context.evidence, context.params)
    for case in cases.iter_cases(context.iter_fired(), iter_heat_maps(context.inputs["evaluate"]), wanted):
        images = np.array([example.image for example in (*case.firing, *case.silent)], dtype=np.int64)
        context.has_named[split.rows_of(images)] = True
        yield case


def _normalise(answer: Answer) -> Answer:
    """Return the answer with a label if the status is ok and without one otherwise, whatever the labeller returned."""
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
            Warned(
                f"{context.sae}: {name} has no label for {len(failed)} of {len(answers)} latents: {counted}{why}; labels by others are kept"
            )
        )


Row = dict[str, Any]
"""A row of the table by column; missing columns are null."""


def make_tables(context: Context, answers: Mapping[str, Answers]) -> dict[str, pa.Table]:
    """Make the tables, sorted by latent and labeller: `labels` has one row per answer, and `mistakes` what scored labels get wrong."""
    rows: dict[str, dict[int, Row]] = {}
    for place, (name, by_latent) in enumerate(answers.items(), start=1):
        same = {"sae": context.sae, "labeller": name, "place": place}
        columns = ("status", "label", "detail", "n_requests", "n_tokens")
        rows[name] = {i: {**same, "latent": i, **{key: getattr(answer, key) for key in columns}} for i, answer in by_latent.items()}
    scorer = Scorer(context.material.images, context.material.split, context.evidence, context.params.seed)
    mistakes = _add_scores(context, scorer, rows)
    for name, source in context.material.sources.items():
        if isinstance(source, ImageLabeller) and source.detector:
            _detect(context, scorer, rows[name], name, source.detector, source.concurrency)
    ordered = sorted((row for by_latent in rows.values() for row in by_latent.values()), key=lambda row: (row["latent"], row["place"]))
    return {"labels": pa.Table.from_pylist(ordered, schema=schemas.LABELS), "mistakes": mistakes}


def _add_scores(context: Context, scorer: Scorer, rows: Mapping[str, dict[int, Row]]) -> pa.Table:
    """Fill in the scores of labels by their embeddings in the joint space, and return the table `mistakes`."""
    strongest, texts = context.evidence.strongest, context.material.texts
    labels = {
        name: {latent: row["label"] for latent, row in by_latent.items() if row["label"] is not None} for name, by_latent in rows.items()
    }
    controls = Controls(labels, strongest.keys(), texts, context.d_sae, context.params.seed)
    mistakes: list[tuple[int, str, np.ndarray]] = []
    for fired, trial in _iter_trials(context, scorer):
        images = strongest[fired.latent]
        direction = unit(mean_direction(context.material.images[images.rows], images.acts)[None])[0]
        for name, by_latent in labels.items():
            if fired.latent in by_latent:
                embeddings = controls.of(name, fired.latent)
                row = rows[name][fired.latent]
                row["similarity"] = float(direction @ embeddings.label.double())
                if trial:
                    scored = scorer.score(trial, embeddings)
                    row |= scored.scores
                    mistakes.append((fired.latent, name, scored.mistakes))
        context.on_event(Progress("score labels", fired.latent + 1, context.d_sae))
    return _make_mistakes(context, mistakes)


def _make_mistakes(context: Context, found: Sequence[tuple[int, str, np.ndarray]]) -> pa.Table:
    """Make the table `mistakes` from the mistakes of each latent's labels by labeller."""
    mistakes = np.concatenate([np.empty(0, MISTAKE), *(each for _, _, each in found)])
    times = [len(each) for _, _, each in found]
    columns = {
        "sae": pa.array([context.sae] * len(mistakes), pa.string()),
        "latent": np.repeat(np.array([latent for latent, _, _ in found], np.int32), times),
        "labeller": pa.array([name for (_, name, _), n in zip(found, times, strict=True) for _ in range(n)], pa.string()),
        "kind": pa.array(np.where(mistakes["is_missed"], "missed", "false_alarm").tolist(), pa.string()),
        "image": context.material.split.images[mistakes["row"]].astype(np.int32),
        **{name: mistakes[name].copy() for name in ("rank", "cosine", "threshold", "act")},
        "is_hard": pa.array(mistakes["is_hard"], mask=mistakes["is_missed"]),
    }
    return pa.table({name: columns[name] for name in schemas.MISTAKES.names}, schema=schemas.MISTAKES)


def _detect(context: Context, scorer: Scorer, rows: dict[int, Row], name: str, detector: Detector, concurrency: int) -> None:
    """Fill in the scores of labels by the labeller's own detector."""
    spool, n_firing = context.spool(), dict[int, int]()

    def questions() -> Iterator[tuple[int, tuple[str, tuple[bytes, ...]]]]:
        for fired, trial in _iter_trials(context, scorer):
            label = rows[fired.latent]["label"] if fired.latent in rows else None
            if trial and label is not None:
                drawn, n_firing[fired.latent] = draw_detection(trial.held_out)
                yield fired.latent, (label, tuple(spool.read(row)[0] for row in drawn.tolist()))

    for latent, grades in ask_each(lambda question: detector.fires(*question), questions(), concurrency):
        rows[latent] |= grade(grades, n_firing[latent]) if grades else {}
        context.on_event(Progress(f"detect by {name}", latent + 1, context.d_sae))


def _iter_trials(context: Context, scorer: Scorer) -> Iterator[tuple[LatentFirings, Trial | None]]:
    """Iterate over the latents whose labels can be scored, in order, with their test images; None if there are no silent images."""
    for fired in context.iter_fired():
        if fired.latent in context.evidence.strongest:
            trial = scorer.draw(fired)
            if trial:
                context.has_named[trial.naming.rows] = True
                context.has_scored[trial.held_out.rows] = True
            yield fired, trial


MEAN_COLUMNS = ("score", "auroc", "control_score", "random_score", "correlation", "control_correlation", "detector_score")
MEAN_COLUMNS += ("precision", "precision_chance", "recall", "recall_chance")
"""Columns of `labels` whose mean over the latents is in the summary."""


def summarise(context: Context, table: pa.Table) -> LabelsSummary:
    """Return the summary of the labels; if there are several labellers, it also has the numbers of each, as `<key>_<labeller>`."""
    rows = table.to_pylist()
    split = context.material.split
    by_labeller = {name: [row for row in rows if row["labeller"] == name] for name in context.material.sources}
    per_labeller = {f"{key}_{name}": value for name, own_rows in by_labeller.items() for key, value in _numbers(own_rows).items()}
    return LabelsSummary(
        labellers=list(by_labeller),
        n_latents=context.d_sae,
        n_words=len(context.material.texts.words),
        n_naming_images=int((~split.is_held_out).sum()),
        n_held_out_images=int(split.is_held_out.sum()),
        n_images_in_both=int((context.has_named & context.has_scored).sum()),
        **_numbers(best_labels(rows)),
        **(per_labeller if len(by_labeller) > 1 else {}),
        n_requests=sum(row["n_requests"] for row in rows),
        n_tokens=sum(row["n_tokens"] for row in rows),
    )


def best_labels(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the best label of each latent, as catalog/sql/features.sql chooses it.

    A label by people is the best whatever its score, because what a person corrects must stay corrected. Otherwise the highest score
    decides; among equals, the first labeller.
    """
    best: dict[int, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["place"]):
        if row["status"] == "ok" and (row["latent"] not in best or _worth(row) > _worth(best[row["latent"]])):
            best[row["latent"]] = row
    return list(best.values())


def _worth(row: dict[str, Any]) -> tuple[bool, float]:
    return row["labeller"].startswith("human"), -1.0 if row["score"] is None else row["score"]


def _numbers(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers of the summary for a list of labels with at most one per latent."""
    return {
        "n_labelled": sum(row["status"] == "ok" for row in rows),
        "n_scored": sum(row["score"] is not None for row in rows),
        **{name: _mean(row[name] for row in rows) for name in MEAN_COLUMNS},
        "beats_control": _share_above(rows, "control_score"),
        "beats_random": _share_above(rows, "random_score"),
    }


def _share_above(rows: Iterable[dict[str, Any]], control: str) -> float | None:
    """Return the share of labels that score higher than a control, among those with both scores; None if there are none."""
    return _mean(float(row["score"] > row[control]) for row in rows if row["score"] is not None and row[control] is not None)


def _mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
