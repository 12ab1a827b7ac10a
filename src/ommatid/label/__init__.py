"""Stage `label`: names for latents, and how far to believe them."""

from ommatid.label.evidence.context import load_material
from ommatid.label.stage import label

__all__ = ["label", "load_material"]
