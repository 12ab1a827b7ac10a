"""Stage `label`: labels for latents, each scored on images that it was not made from."""

from pathlib import Path

from ommatid.stage import Stage

STAGE = Stage(
    "label",
    kind="labellings",
    place=Path("data/labels"),
    inputs=("images", "extract", "train", "evaluate"),
    is_per_sae=True,
    has_binding_params=False,
    memory_advice="name fewer label.labellers at a time",
)
