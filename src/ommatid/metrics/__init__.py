"""Every metric once, from accumulators in float64 that can be merged over batches, shards and workers.

Suffixes: b tokens or images of a batch, d d_model or the judge's width, s latents.
"""

from ommatid.metrics.cofiring import CoFiring
from ommatid.metrics.detection import auroc, balanced_accuracy, best_threshold, rank_correlation
from ommatid.metrics.fidelity import Fidelity, FidelityByKind
from ommatid.metrics.firing import Decade, Firing, TopImages, density_histogram
from ommatid.metrics.hierarchy import lca_depth
from ommatid.metrics.meaning import coverage, label_entropy, purity
from ommatid.metrics.monosemanticity import Monosemanticity, MonosemanticityInterval, MonosemanticityScores
from ommatid.metrics.probe import LogisticProbes, fit_probes
from ommatid.metrics.uniqueness import uniqueness
from ommatid.metrics.vectors import nan_mean, unit

__all__ = [
    "CoFiring",
    "Decade",
    "Fidelity",
    "FidelityByKind",
    "Firing",
    "LogisticProbes",
    "Monosemanticity",
    "MonosemanticityInterval",
    "MonosemanticityScores",
    "TopImages",
    "auroc",
    "balanced_accuracy",
    "best_threshold",
    "coverage",
    "density_histogram",
    "fit_probes",
    "label_entropy",
    "lca_depth",
    "nan_mean",
    "purity",
    "rank_correlation",
    "uniqueness",
    "unit",
]
