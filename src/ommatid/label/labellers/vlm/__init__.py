"""The labeller `vlm`: a vision-language model behind an OpenAI-compatible server. How to use it: docs/users/labels-from-models.md."""

from ommatid.label.labellers.vlm.cache import Memory, in_checkout
from ommatid.label.labellers.vlm.labeller import Vlm

__all__ = ["Memory", "Vlm", "in_checkout"]
