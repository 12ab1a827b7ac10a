"""Profile and rules of the stage `images`: images are unique, readable and in both splits."""

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.compute as pc

from ommatid.config import Params
from ommatid.quality.base import SHOWN, Frames, Rule, files_of, iter_batches, named, query, select, within, zero
from ommatid.store import Artefact


def profile(artefact: Artefact, params: Params) -> Frames:
    """Make the frames `parts` (one row for each part), `splits` (one for each split) and `whole` (one row)."""
    files = files_of(artefact, "images")
    parts = [{**select(_IMAGE_PART, [path]), **_encoded(artefact, path.name)} for path in files]
    counts = {split: select(f"count(*) FILTER (split = '{split}') AS n", files)["n"] if files else 0 for split in ("train", "eval")}
    splits = pd.DataFrame({"split": counts.keys(), "images": counts.values()})
    return {"parts": pd.DataFrame(parts), "splits": splits, "whole": pd.DataFrame([_image_set(artefact, files)])}


_IMAGE_PART = f"""
    count(*) AS rows,
    count(*) FILTER (width < 1 OR height < 1) AS "images without size",
    arg_min('image ' || image || ' ' || path, image, {SHOWN}) FILTER (width < 1 OR height < 1) AS "first without size",
    count(*) FILTER (split NOT IN ('train', 'eval')) AS "images of unknown split",
    arg_min('image ' || image || ' ' || split, image, {SHOWN}) FILTER (split NOT IN ('train', 'eval')) AS "first of unknown split"
"""


def _encoded(artefact: Artefact, part: str) -> dict[str, Any]:
    """Count the images of a part whose bytes are empty. Few are read at a time, because one photograph may have tens of megabytes."""
    empty: list[str] = []
    for batch in iter_batches(artefact, part, ["image", "encoded"], n_rows=64):
        lengths = pc.call_function("binary_length", [batch["encoded"]]).fill_null(0).to_numpy(zero_copy_only=False)
        empty += [f"image {image}" for image in batch["image"].to_numpy()[lengths == 0]]
    return {"images without bytes": len(empty), "first without bytes": named(empty[:SHOWN])}


def _image_set(artefact: Artefact, files: list[Path]) -> dict[str, Any]:
    """Make the row of the frame `whole`: repeated ids and keys, and the share of items that were rejected."""
    repeated = query("SELECT image_id, count(*) AS n FROM {} GROUP BY ALL HAVING n > 1 ORDER BY image_id", files)
    keys = query("SELECT image, count(*) AS n FROM {} GROUP BY ALL HAVING n > 1 ORDER BY image", files)
    rejected = query("SELECT path, reason FROM {} WHERE reason <> 'duplicate' ORDER BY path", files_of(artefact, "rejected"))
    n = artefact.rows("images")
    return {
        "set": "all images",
        "repeated ids": len(repeated),
        "first repeated ids": named([f"{id_} ({times} times)" for id_, times in repeated[:SHOWN]]),
        "repeated keys": len(keys),
        "first repeated keys": named([f"image {image} ({times} times)" for image, times in keys[:SHOWN]]),
        "rejected share": len(rejected) / max(1, n + len(rejected)),
        "first rejected": named([f"{path} ({reason})" for path, reason in rejected[:10]]),
    }


def rules(params: Params) -> list[Rule]:
    """Make the rules under which a data set is fit for training and evaluation, and represents its source."""
    return [
        within(
            "splits",
            "images",
            "both splits have images",
            "training needs images of the split train; evaluation and labelling need other images, which training never saw",
            row="split",
            min_value=1,
        ),
        zero(
            "whole",
            "repeated ids",
            "image ids are unique",
            "a repeated picture would count twice in every score, and could be in both splits",
            row="set",
            first="first repeated ids",
        ),
        zero(
            "whole",
            "repeated keys",
            "image keys are unique",
            "every other table refers to an image by this key",
            row="set",
            first="first repeated keys",
        ),
        zero(
            "parts",
            "images of unknown split",
            "every split is train or eval",
            "an image of any other split would silently go unused",
            first="first of unknown split",
        ),
        zero(
            "parts",
            "images without size",
            "width and height are positive",
            "heat maps are laid over images by their width and height",
            first="first without size",
        ),
        zero(
            "parts",
            "images without bytes",
            "every image has its bytes",
            "extraction decodes these bytes, since the data set does not depend on its source",
            first="first without bytes",
        ),
        within(
            "whole",
            "rejected share",
            "few images are rejected",
            f"a share of unusable items above images.max_rejected ({params.images.max_rejected:g}) means a wrong or broken source",
            row="set",
            first="first rejected",
            max_value=params.images.max_rejected,
        ),
    ]
