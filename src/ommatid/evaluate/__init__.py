"""Stage `evaluate`: measure every latent on the evaluation split, and compare the SAE with raw neurons and an untrained SAE."""

from pathlib import Path

from ommatid.stage import Stage

STAGE = Stage(
    "evaluate",
    kind="evaluations",
    place=Path("data/evaluation"),
    inputs=("images", "extract", "train"),
    is_per_sae=True,
    reads_target=True,
    memory_advice="leave out evaluate.baselines, or evaluate SAEs of a lower train.d_sae",
)
