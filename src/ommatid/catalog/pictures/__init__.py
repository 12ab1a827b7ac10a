"""Pictures of a catalogue, as PNG: a feature, the best features, all its SAEs beside one another."""

from ommatid.catalog.pictures.best import draw_best
from ommatid.catalog.pictures.choice import choose_sae
from ommatid.catalog.pictures.comparison import draw_comparison
from ommatid.catalog.pictures.feature import draw_feature

__all__ = ["choose_sae", "draw_best", "draw_comparison", "draw_feature"]
