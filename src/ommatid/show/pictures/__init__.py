"""Pictures of a catalogue, as PNG: a feature, the best features, all its SAEs beside one another."""

from ommatid.show.pictures.best import draw_best
from ommatid.show.pictures.comparison import choose_sae, draw_comparison
from ommatid.show.pictures.feature import draw_feature

__all__ = ["choose_sae", "draw_best", "draw_comparison", "draw_feature"]
