"""What is checked of labels: each is text or a status, never text about a failure, and its scores can be believed."""

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from ommatid.config import Params
from ommatid.quality.base import SHOWN, Frames, Rule, filled, named, one_of, table_of, within, zero
from ommatid.store import Artefact

_SCORES = ("score", "auroc", "auroc_low", "auroc_high", "control_score", "random_score", "detector_score", "detector_auroc")
_CORRELATIONS = ("correlation", "control_correlation")


def profile(artefact: Artefact, params: Params) -> Frames:
    """Frames `labels` (one row a latent and labeller), `labellers` (one row each) and `counts` (one row)."""
    labels = table_of(artefact, "labels", ["latent", "labeller", "status", "label", *_SCORES, *_CORRELATIONS])
    each = params.label.each()
    by = labels["labeller"].to_numpy(object)
    labellers = [_labeller(name, kind.is_selective, labels.loc[by == name], params.train.d_sae) for name, kind in each.items()]
    ok = labels["status"].to_numpy(object) == "ok"
    labels["label disagrees with status"] = ok != labels["label"].notna()
    labels["label is empty"] = [label is not None and not str(label).strip() for label in labels["label"]]
    labels["score without status ok"] = labels["score"].notna() & ~ok
    labels["score outside 0 to 1"] = _outside(labels, _SCORES, 0)
    labels["correlation outside -1 to 1"] = _outside(labels, _CORRELATIONS, -1)
    if len(each) > 1:
        labels["latent"] = [f"{latent} ({name})" for latent, name in zip(labels["latent"], by, strict=True)]
    counts = {
        "set": "all labels",
        "ok labels": int(ok.sum()),
        "first statuses": named([f"{n} {status}" for status, n in Counter(labels["status"]).items()]),
        "labels of unknown labellers": sum(name not in each for name in by),
        "images in both halves": artefact.summary.get("n_images_in_both"),
    }
    return {"labels": labels, "labellers": pd.DataFrame(labellers), "counts": pd.DataFrame([counts])}


def _labeller(name: str, is_selective: bool, own: pd.DataFrame, d_sae: int) -> dict[str, Any]:
    """A row of frame `labellers`: latents with too few or too many rows, and how far the controls are from chance."""
    times = Counter(own["latent"].tolist())
    lacking = [] if is_selective else [latent for latent in range(d_sae) if latent not in times]
    odd = sorted({*lacking, *(latent for latent, n in times.items() if n > 1 or not 0 <= latent < d_sae)})
    row = {"labeller": name, "latents missing or repeated": len(odd), "first missing": named([f"latent {n}" for n in odd[:SHOWN]])}
    return row | {f"{control} off chance": _off_chance(own[control]) for control in ("control_score", "random_score")}


def _off_chance(scores: Any) -> float:
    """How far the mean of scores is from one half, beyond two standard errors; 0 where there are none.

    A share lies within 0.5 of one half, so the mean of n of them has a standard error of 0.5 / sqrt(n) at most.
    """
    known = scores.dropna().to_numpy(np.float64)
    return max(0.0, abs(float(known.mean()) - 0.5) - len(known) ** -0.5) if len(known) else 0.0


def _outside(frame: pd.DataFrame, columns: tuple[str, ...], low: float) -> list[str]:
    """For each row, the first of these columns whose value is not null and lies below `low` or above 1, with the value; else empty."""
    values = frame[list(columns)].to_numpy(np.float64, na_value=np.nan)
    found = [""] * len(values)
    for row, column in np.argwhere((values < low) | (values > 1))[::-1].tolist():
        found[row] = f"{columns[column]} {values[row, column]:g}"
    return found


def rules(params: Params) -> list[Rule]:
    """Rules under which labels are text or a status, never text about a failure, and their scores can be believed."""
    statuses = ["ok", "unparsed", "refused", "failed", "over_budget", "too_few_examples"]
    return [
        one_of("labels", "status", statuses, "every status is known", "pages and queries tell labels from failures by it", row="latent"),
        one_of(
            "labels",
            "label disagrees with status",
            [False],
            "there is a label if and only if the status is ok",
            "a failed label must not be read, searched or scored as one",
            row="latent",
        ),
        one_of("labels", "label is empty", [False], "no label is empty", "an empty name would be shown and searched as one", row="latent"),
        one_of(
            "labels",
            "score without status ok",
            [False],
            "only labels with status ok have a score",
            "a mean over scores must not count what has no label",
            row="latent",
        ),
        one_of(
            "labels",
            "score outside 0 to 1",
            [""],
            "scores lie between 0 and 1",
            "balanced accuracy and the area under a ROC curve lie between 0 and 1",
            row="latent",
        ),
        one_of(
            "labels",
            "correlation outside -1 to 1",
            [""],
            "correlations lie between -1 and 1",
            "they are cosines of ranks",
            row="latent",
        ),
        zero(
            "labellers",
            "latents missing or repeated",
            "every latent has one row for each labeller",
            "a latent without a label has a status that says why; only people label some and not others",
            row="labeller",
            first="first missing",
        ),
        zero(
            "counts",
            "labels of unknown labellers",
            "all rows come from the labellers of label.labellers",
            "else nobody asked for them",
            row="set",
        ),
        filled("counts", "images in both halves", "the uses of images were counted", "see the next check", row="set"),
        zero(
            "counts",
            "images in both halves",
            "no image both made and scored a label",
            "a name scored on the images that made it says nothing of others",
            row="set",
        ),
        *(
            _near_chance(control, whose)
            for control, whose in (("control_score", "another latent's name"), ("random_score", "a random word"))
        ),
        within(
            "counts",
            "ok labels",
            "some latent has a label",
            "with none, every labeller failed, or vocabulary or examples are wrong",
            row="set",
            first="first statuses",
            min_value=1,
        ),
    ]


_CHANCE = 0.1
"""Distance from one half that the mean of a control may have, besides two standard errors; labels of kindred latents fit, too."""


def _near_chance(control: str, whose: str) -> Rule:
    return within(
        "labellers",
        f"{control} off chance",
        f"{whose} scores near chance",
        f"a name that is not the latent's can tell its images only by luck or kinship: a mean more than {_CHANCE:g} (and two standard "
        "errors) from 0.5 means that the test itself gives the answer away",
        row="labeller",
        max_value=_CHANCE,
    )
