"""Stage `train`: train one or several SAEs in one pass over the activations, or import them."""

from pathlib import Path

from ommatid.stage import Stage

STAGE = Stage(
    "train",
    kind="training",
    place=Path("data/sae"),
    inputs=("extract",),
    is_per_sae=True,
    reads_target=True,
    memory_advice="lower train.batch_size or train.d_sae, or train fewer SAEs at a time (train.runs, train.grid)",
    recorder="ommatid.tracking:training_runs",
    drawer="ommatid.show.health:draw_all",
)
