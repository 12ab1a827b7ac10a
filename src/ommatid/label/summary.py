"""Headline numbers of an SAE's labels: of each latent the best label counts, as in the catalogue."""

from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from ommatid.label.subject import Subject

MEANS = ("score", "auroc", "control_score", "random_score", "correlation", "control_correlation", "detector_score")
"""Columns of `labels` whose mean over the latents is told."""


def summarise(subject: Subject, table: pa.Table) -> dict[str, Any]:
    """For the gate, MLflow and the pages; of several labellers also what each has, as `<number>_<labeller>`."""
    rows = table.to_pylist()
    halves = subject.material.halves
    by_labeller = {name: [row for row in rows if row["labeller"] == name] for name in subject.material.sources}
    apart = {f"{key}_{name}": value for name, own in by_labeller.items() for key, value in _numbers(own).items()}
    return {
        "labellers": list(by_labeller),
        "n_latents": subject.d_sae,
        "n_words": len(subject.material.texts.words),
        "n_naming_images": int((~halves.is_held_out).sum()),
        "n_held_out_images": int(halves.is_held_out.sum()),
        "n_images_in_both": int((subject.has_named & subject.has_scored).sum()),
        **_numbers(best_labels(rows)),
        **(apart if len(by_labeller) > 1 else {}),
        "n_requests": sum(row["n_requests"] for row in rows),
        "n_tokens": sum(row["n_tokens"] for row in rows),
    }


def best_labels(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each latent with a label the one that scores best; of equals the one whose labeller stands first (catalog/sql/features.sql)."""
    best: dict[int, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["place"]):
        if row["status"] == "ok" and (row["latent"] not in best or _score(row) > _score(best[row["latent"]])):
            best[row["latent"]] = row
    return list(best.values())


def _score(row: dict[str, Any]) -> float:
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
