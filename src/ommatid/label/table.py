"""The table `labels`, and the headline numbers of an SAE's labels."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from ommatid import schemas
from ommatid.events import Progress
from ommatid.images.eval_split import LatentFirings
from ommatid.label.evidence.context import Context
from ommatid.label.labellers import Asked
from ommatid.label.labellers.base import Detector
from ommatid.label.labellers.vocabulary import mean_direction
from ommatid.label.naming import Answers, ask_each
from ommatid.label.scoring import Controls, Scorer, Trial, draw_detection, grade
from ommatid.metrics import unit

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


def summarise(context: Context, table: pa.Table) -> dict[str, Any]:
    """For the gate, MLflow and the pages; of several labellers also what each has, as `<number>_<labeller>`."""
    rows = table.to_pylist()
    halves = context.material.halves
    by_labeller = {name: [row for row in rows if row["labeller"] == name] for name in context.material.sources}
    apart = {f"{key}_{name}": value for name, own in by_labeller.items() for key, value in _numbers(own).items()}
    return {
        "labellers": list(by_labeller),
        "n_latents": context.d_sae,
        "n_words": len(context.material.texts.words),
        "n_naming_images": int((~halves.is_held_out).sum()),
        "n_held_out_images": int(halves.is_held_out.sum()),
        "n_images_in_both": int((context.has_named & context.has_scored).sum()),
        **_numbers(best_labels(rows)),
        **(apart if len(by_labeller) > 1 else {}),
        "n_requests": sum(row["n_requests"] for row in rows),
        "n_tokens": sum(row["n_tokens"] for row in rows),
    }


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
