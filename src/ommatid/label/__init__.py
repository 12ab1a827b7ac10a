"""Stage `label`: names for latents, and how far to believe them."""

from ommatid.label.stage import label, load_material

__all__ = ["label", "load_material"]
