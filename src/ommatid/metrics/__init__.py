"""Every metric once, from accumulators in float64 that can be merged over batches, shards and workers.

Suffixes: b tokens or images of a batch, d d_model or the judge's width, s latents.
"""

from ommatid.metrics.arrays import monosemanticity
from ommatid.metrics.detection import auroc, balanced_accuracy, best_threshold
from ommatid.metrics.fidelity import Fidelity
from ommatid.metrics.firing import Firing, TopImages
from ommatid.metrics.meaning import purity
from ommatid.metrics.monosemanticity import Monosemanticity, MonosemanticityInterval, MonosemanticityScores
from ommatid.metrics.vectors import nan_mean, unit

__all__ = [
    "Fidelity",
    "Firing",
    "Monosemanticity",
    "MonosemanticityInterval",
    "MonosemanticityScores",
    "TopImages",
    "auroc",
    "balanced_accuracy",
    "best_threshold",
    "monosemanticity",
    "nan_mean",
    "purity",
    "unit",
]
