"""Pictures of a catalogue as PNG: one feature, the best features, and a comparison of its SAEs."""

from ommatid.show.pictures.best import draw_best
from ommatid.show.pictures.comparison import draw_comparison
from ommatid.show.pictures.feature import draw_feature

__all__ = ["draw_best", "draw_comparison", "draw_feature"]
