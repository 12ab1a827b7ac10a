"""The table `labels`: what was said of each latent, and how far to believe it."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from ommatid import schemas
from ommatid.events import Progress
from ommatid.halves import Fired
from ommatid.label.asked import ask_each
from ommatid.label.controls import Controls
from ommatid.label.labeller import Detector
from ommatid.label.labellers import Asked
from ommatid.label.naming import Answers
from ommatid.label.scores import Scorer, Trial, draw_detection, grade
from ommatid.label.subject import Subject
from ommatid.label.vocabulary import mean_direction
from ommatid.metrics import unit

Row = dict[str, Any]
"""Of the table, by column; what is not there is null."""


def make_table(subject: Subject, answers: Mapping[str, Answers]) -> pa.Table:
    """A row for each latent and labeller that says something of it, with the scores of the names."""
    rows: dict[str, dict[int, Row]] = {}
    for place, (name, said) in enumerate(answers.items(), start=1):
        same = {"sae": subject.sae, "labeller": name, "place": place}
        columns = ("status", "label", "detail", "n_requests", "n_tokens")
        rows[name] = {i: {**same, "latent": i, **{key: getattr(answer, key) for key in columns}} for i, answer in said.items()}
    scorer = Scorer(subject.material.images, subject.material.halves, subject.gathered, subject.params.seed)
    _score(subject, scorer, rows)
    for name, source in subject.material.sources.items():
        if isinstance(source, Asked) and source.detector:
            _detect(subject, scorer, rows[name], name, source.detector, source.concurrency)
    ordered = sorted((row for of in rows.values() for row in of.values()), key=lambda row: (row["latent"], row["place"]))
    return pa.Table.from_pylist(ordered, schema=schemas.LABELS)


def _score(subject: Subject, scorer: Scorer, rows: Mapping[str, dict[int, Row]]) -> None:
    """Fill in the scores of names by their places in the joint space."""
    strongest, texts = subject.gathered.strongest, subject.material.texts
    labels = {name: {i: row["label"] for i, row in of.items() if row["label"] is not None} for name, of in rows.items()}
    controls = Controls(labels, strongest.keys(), texts, subject.d_sae, subject.params.seed)
    for fired, trial in _iter_trials(subject, scorer):
        images = strongest[fired.latent]
        direction = unit(mean_direction(subject.material.images[images.rows], images.acts)[None])[0]
        for name, of in labels.items():
            if fired.latent in of:
                tried = controls.of(name, fired.latent)
                row = rows[name][fired.latent]
                row["similarity"] = float(direction @ tried.name.double())
                row |= scorer.score(trial, tried) if trial else {}
        subject.on_event(Progress("score labels", fired.latent + 1, subject.d_sae))


def _detect(subject: Subject, scorer: Scorer, rows: dict[int, Row], name: str, detector: Detector, concurrency: int) -> None:
    """Fill in the scores of a labeller's own second opinion on its names."""
    spool, n_firing = subject.spool(), dict[int, int]()

    def questions() -> Iterator[tuple[int, tuple[str, tuple[bytes, ...]]]]:
        for fired, trial in _iter_trials(subject, scorer):
            label = rows[fired.latent]["label"] if fired.latent in rows else None
            if trial and label is not None:
                drawn, n_firing[fired.latent] = draw_detection(trial.held_out)
                yield fired.latent, (label, tuple(spool.read(row)[0] for row in drawn.tolist()))

    for latent, grades in ask_each(lambda asked: detector.fires(*asked), questions(), concurrency):
        rows[latent] |= grade(grades, n_firing[latent]) if grades else {}
        subject.on_event(Progress(f"detect by {name}", latent + 1, subject.d_sae))


def _iter_trials(subject: Subject, scorer: Scorer) -> Iterator[tuple[Fired, Trial | None]]:
    """The latents whose names are scored, in order, and on what."""
    for fired in subject.iter_fired():
        if fired.latent in subject.gathered.strongest:
            trial = scorer.draw(fired)
            if trial:
                subject.has_named[trial.naming.rows] = True
                subject.has_scored[trial.held_out.rows] = True
            yield fired, trial
