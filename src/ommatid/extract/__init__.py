"""Stage `extract`: activations of images, or of files made elsewhere, in the order in which training reads them."""

from pathlib import Path

from ommatid.stage import Stage

STAGE = Stage(
    "extract",
    kind="extraction",
    place=Path("data/activations"),
    inputs=("images",),
    memory_advice="lower extract.batch_size, or extract.executor.workers where there are several",
    opener="ommatid.extract.opening:open_activations",
)
