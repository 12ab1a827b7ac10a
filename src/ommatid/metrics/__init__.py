"""All metrics, each defined once. Most are float64 accumulators that can be merged over batches, shards and workers.

Suffixes of names: b tokens or images of a batch, d d_model or the width of the judge, s latents.
"""

from ommatid.metrics.arrays import monosemanticity
from ommatid.metrics.classes import coverage, label_entropy, lca_depth, purity
from ommatid.metrics.detection import auroc, balanced_accuracy, best_threshold, rank_correlation
from ommatid.metrics.fidelity import Fidelity, FidelityByKind
from ommatid.metrics.firing import Decade, Firing, TopImages, density_histogram
from ommatid.metrics.matching import BestMatches, best_matches, chance_cosine, match_one_to_one
from ommatid.metrics.monosemanticity import Monosemanticity, MonosemanticityInterval, MonosemanticityScores
from ommatid.metrics.overlap import CoFiring, uniqueness
from ommatid.metrics.probe import LogisticProbes, fit_probes
from ommatid.metrics.vectors import nan_mean, unit
from ommatid.metrics.zero_shot import Classified, Interval, classify, fit_scale, recovered

__all__ = [
    "BestMatches",
    "Classified",
    "CoFiring",
    "Decade",
    "Fidelity",
    "FidelityByKind",
    "Firing",
    "Interval",
    "LogisticProbes",
    "Monosemanticity",
    "MonosemanticityInterval",
    "MonosemanticityScores",
    "TopImages",
    "auroc",
    "balanced_accuracy",
    "best_matches",
    "best_threshold",
    "chance_cosine",
    "classify",
    "coverage",
    "density_histogram",
    "fit_probes",
    "fit_scale",
    "label_entropy",
    "lca_depth",
    "match_one_to_one",
    "monosemanticity",
    "nan_mean",
    "purity",
    "rank_correlation",
    "recovered",
    "uniqueness",
    "unit",
]
