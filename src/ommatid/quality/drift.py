"""The gate of a check of new images for drift, whose report is written whether or not a retraining stops."""

import pandas as pd

from ommatid.config import Params
from ommatid.quality.base import Frames, Rule, within
from ommatid.store import Artefact

_ABOVE = {"auroc": "AUROC above chance", "fvu_rise": "FVU rise above chance", "changed": "changed latents"}
"""Columns of the frame, by key of the summary."""


def profile(artefact: Artefact, params: Params) -> Frames:
    """Return one row of the numbers that the thresholds limit; null unless they are above chance."""
    row = {"check": artefact.folder.name, "verdict": artefact.summary["verdict"]}
    return {"check": pd.DataFrame([row | {column: _number(artefact.summary[key]) for key, column in _ABOVE.items()}])}


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def rules(params: Params) -> list[Rule]:
    """Return what must hold of new images for a training on them to be a matter of course."""
    drift = params.drift
    return [
        within(
            "check",
            _ABOVE["auroc"],
            f"a classifier does not tell new images from the champion's with an AUROC above {drift.max_auroc:g}",
            "images of another kind may need another look, other labels or another model before an SAE is trained on them",
            row="check",
            max_value=drift.max_auroc,
        ),
        within(
            "check",
            _ABOVE["fvu_rise"],
            f"the champion's FVU is no more than {drift.max_fvu_rise:g} higher on new images",
            "what the champion does not reconstruct, its features do not describe",
            row="check",
            max_value=drift.max_fvu_rise,
        ),
        within(
            "check",
            _ABOVE["changed"],
            f"no more than {drift.max_changed:.1%} of the latents fire more often, more rarely, more or less strongly",
            "the images then show other things, or show them in another way; the changed latents say which",
            row="check",
            max_value=drift.max_changed,
        ),
    ]
