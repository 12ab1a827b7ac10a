"""Pictures of a catalogue as PNG: one feature, the best features, and a comparison of its SAEs."""

from ommatid.show.pictures.best import draw_best
from ommatid.show.pictures.comparison import choose_sae, draw_comparison
from ommatid.show.pictures.feature import draw_feature

__all__ = ["choose_sae", "draw_best", "draw_comparison", "draw_feature"]
