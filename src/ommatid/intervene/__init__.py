"""Stage `intervene`: what a latent does to the model's output, which is another question than what it shows."""

from pathlib import Path

from ommatid.stage import Stage

STAGE = Stage(
    "intervene",
    kind="interventions",
    place=Path("data/interventions"),
    inputs=("images", "extract", "train", "evaluate", "label"),
    is_per_sae=True,
    reads_target=True,
    has_binding_params=False,
    memory_advice="lower intervene.n_images or intervene.draws",
)
