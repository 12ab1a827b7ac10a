"""Stage `label`: names for latents, and how far to believe them."""

from ommatid.label.stage import label

__all__ = ["label"]
