"""Stage `extract`: computes activations and embeddings of images, or imports activations, and writes them in the order of training."""

from pathlib import Path

from ommatid.stage import Stage

STAGE = Stage(
    "extract",
    kind="extraction",
    place=Path("data/activations"),
    inputs=("images",),
    memory_advice="lower extract.batch_size, or extract.executor.workers if there are several",
    opener="ommatid.extract.selection:open_activations",
)
