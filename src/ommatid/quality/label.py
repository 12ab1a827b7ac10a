"""Profile and rules of the stage `label`: a failure is a status and never passes for a label, and scores can be trusted."""

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from ommatid.config import Params
from ommatid.quality.base import SHOWN, Frames, Rule, files_of, filled, named, one_of, query, select, table_of, within, zero
from ommatid.schemas import N_MISTAKES
from ommatid.store import Artefact

_SCORES = ("score", "auroc", "auroc_low", "auroc_high", "control_score", "random_score", "detector_score", "detector_auroc")
_SCORES += ("precision", "precision_chance", "recall", "recall_chance")
_CORRELATIONS = ("correlation", "control_correlation")


def profile(artefact: Artefact, params: Params) -> Frames:
    """Make the frames of the labels.

    They are `labels` (one row for each latent and labeller), `labellers` (one for each labeller), `counts` (one row) and `mistakes` (one
    for each part).
    """
    labels = table_of(artefact, "labels", ["latent", "labeller", "status", "label", *_SCORES, *_CORRELATIONS])
    each = params.label.each()
    names = labels["labeller"].to_numpy(object)
    labellers = [_labeller(name, one.is_selective, labels.loc[names == name], params.train.d_sae) for name, one in each.items()]
    ok = labels["status"].to_numpy(object) == "ok"
    labels["label disagrees with status"] = ok != labels["label"].notna()
    labels["label is empty"] = [label is not None and not str(label).strip() for label in labels["label"]]
    labels["score without status ok"] = labels["score"].notna() & ~ok
    labels["score outside 0 to 1"] = _outside(labels, _SCORES, 0)
    labels["correlation outside -1 to 1"] = _outside(labels, _CORRELATIONS, -1)
    if len(each) > 1:
        labels["latent"] = [f"{latent} ({name})" for latent, name in zip(labels["latent"], names, strict=True)]
    disagreeing = query(_DISAGREEING, files_of(artefact, "labels"), files_of(artefact, "mistakes"))
    counts = {
        "set": "all labels",
        "ok labels": int(ok.sum()),
        "first statuses": named([f"{n} {status}" for status, n in Counter(labels["status"]).items()]),
        "labels of unknown labellers": sum(name not in each for name in names),
        "images in both halves": artefact.summary.get("n_images_in_both"),
        "labels whose mistakes disagree": sum(n for n, _ in disagreeing),
        "first disagreeing": named([place for _, places in disagreeing for place in places]),
    }
    mistakes = pd.DataFrame([select(_MISTAKE_PART, [path]) for path in files_of(artefact, "mistakes")])
    return {"labels": labels, "labellers": pd.DataFrame(labellers), "counts": pd.DataFrame([counts]), "mistakes": mistakes}


_MISTAKE = f"""
    rank BETWEEN 1 AND {N_MISTAKES} AND isfinite(cosine) AND CASE kind
        WHEN 'missed' THEN act > 0 AND cosine <= threshold AND is_hard IS NULL
        WHEN 'false_alarm' THEN act = 0 AND cosine > threshold AND is_hard IS NOT NULL
        ELSE false END
"""
_MISTAKE_PART = f"""
    count(*) AS rows,
    count(*) FILTER (NOT ({_MISTAKE})) AS "rows that are not mistakes",
    arg_min('latent ' || latent || ' ' || kind || ' image ' || image, latent, {SHOWN}) FILTER (NOT ({_MISTAKE})) AS "first not mistakes"
"""
_DISAGREEING = f"""
    SELECT count(*), arg_min('latent ' || latent || ' (' || labeller || ')', latent, {SHOWN})
    FROM (SELECT latent, labeller, score FROM {{}}) AS scored
    FULL JOIN (SELECT DISTINCT latent, labeller, true AS is_wrong FROM {{}}) AS mistaken USING (latent, labeller)
    WHERE coalesce(score < 1, false) <> coalesce(is_wrong, false)
    HAVING count(*) > 0
"""
"""Labels whose score says otherwise than their mistakes: only a label with a score below 1 gets an image wrong."""


def _labeller(name: str, is_selective: bool, labels: pd.DataFrame, d_sae: int) -> dict[str, Any]:
    """Make a row of the frame `labellers`: latents with too few or too many rows, and how far the controls are from chance.

    Latents that a selective labeller leaves out are not counted.
    """
    times = Counter(labels["latent"].tolist())
    missing = [] if is_selective else [latent for latent in range(d_sae) if latent not in times]
    odd = sorted({*missing, *(latent for latent, n in times.items() if n > 1 or not 0 <= latent < d_sae)})
    row = {"labeller": name, "latents missing or repeated": len(odd), "first missing": named([f"latent {n}" for n in odd[:SHOWN]])}
    return row | {f"{control} off chance": _off_chance(labels[control]) for control in ("control_score", "random_score")}


def _off_chance(scores: Any) -> float:
    """Return by how much the distance of the mean score from one half exceeds two standard errors; 0 if there are no scores.

    Scores lie between 0 and 1, so the mean of n of them has a standard error of at most 0.5 / sqrt(n).
    """
    known = scores.dropna().to_numpy(np.float64)
    return max(0.0, abs(float(known.mean()) - 0.5) - len(known) ** -0.5) if len(known) else 0.0


def _outside(frame: pd.DataFrame, columns: tuple[str, ...], low: float) -> list[str]:
    """Name, for each row, the first column whose value lies below `low` or above 1, with the value; empty if there is none. Nulls pass."""
    values = frame[list(columns)].to_numpy(np.float64, na_value=np.nan)
    found = [""] * len(values)
    for row, column in np.argwhere((values < low) | (values > 1))[::-1].tolist():
        found[row] = f"{columns[column]} {values[row, column]:g}"
    return found


def rules(params: Params) -> list[Rule]:
    """Make the rules under which a failure never passes for a label, and scores can be trusted."""
    return [*_row_rules(), *_labeller_rules()]


_STATUSES = ["ok", "unparsed", "refused", "failed", "over_budget", "too_few_examples"]


def _row_rules() -> list[Rule]:
    return [
        one_of(
            "labels",
            "status",
            _STATUSES,
            "every status is known",
            "pages and queries distinguish labels from failures by it",
            row="latent",
        ),
        one_of(
            "labels",
            "label disagrees with status",
            [False],
            "there is a label if and only if the status is ok",
            "a failure must not be read, searched or scored as a label",
            row="latent",
        ),
        one_of(
            "labels",
            "label is empty",
            [False],
            "no label is empty",
            "an empty label would be shown and searched like any other",
            row="latent",
        ),
        one_of(
            "labels",
            "score without status ok",
            [False],
            "only labels with status ok have a score",
            "a mean score must not include latents without a label",
            row="latent",
        ),
        one_of(
            "labels",
            "score outside 0 to 1",
            [""],
            "scores lie between 0 and 1",
            "they are balanced accuracies and areas under ROC curves",
            row="latent",
        ),
        one_of(
            "labels",
            "correlation outside -1 to 1",
            [""],
            "correlations lie between -1 and 1",
            "they are rank correlations",
            row="latent",
        ),
    ]


def _labeller_rules() -> list[Rule]:
    return [
        zero(
            "mistakes",
            "rows that are not mistakes",
            "mistakes are what their kind says",
            "pages show them as images that the label gets wrong",
            first="first not mistakes",
        ),
        zero(
            "counts",
            "labels whose mistakes disagree",
            "labels have mistakes if and only if their score is below 1",
            "mistakes explain the score, so both must come from the same images and threshold",
            row="set",
            first="first disagreeing",
        ),
        zero(
            "labellers",
            "latents missing or repeated",
            "every latent has one row for each labeller",
            "a latent without a label has a row whose status says why; only people may leave latents out",
            row="labeller",
            first="first missing",
        ),
        zero(
            "counts",
            "labels of unknown labellers",
            "all rows come from the labellers of label.labellers",
            "labels by anyone else were not requested",
            row="set",
        ),
        filled("counts", "images in both halves", "the uses of images were counted", "the next check needs the count", row="set"),
        zero(
            "counts",
            "images in both halves",
            "no image both made and scored a label",
            "the score of a label on the images that it was made from says nothing about other images",
            row="set",
        ),
        *(
            _near_chance(control, whose)
            for control, whose in (("control_score", "another latent's label"), ("random_score", "a random word"))
        ),
        within(
            "counts",
            "ok labels",
            "some latent has a label",
            "if none has one, every labeller failed, or the vocabulary or the examples are wrong",
            row="set",
            first="first statuses",
            min_value=1,
        ),
    ]


_CHANCE = 0.1
"""Distance from one half that the mean score of a control may have, beyond two standard errors: labels of similar latents fit, too."""


def _near_chance(control: str, whose: str) -> Rule:
    return within(
        "labellers",
        f"{control} off chance",
        f"{whose} scores near chance",
        f"text that is not about the latent fits its images only by luck or likeness: a mean that is more than {_CHANCE:g} (beyond two "
        "standard errors) from 0.5 means that the test itself gives the answer away",
        row="labeller",
        max_value=_CHANCE,
    )
