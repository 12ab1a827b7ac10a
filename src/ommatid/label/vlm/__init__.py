"""The labeller `vlm`: a vision-language model behind an OpenAI-compatible server. How to use it: docs/users/labels-from-models.md."""

from ommatid.label.vlm.labeller import Vlm
from ommatid.label.vlm.memory import Memory, in_checkout

__all__ = ["Memory", "Vlm", "in_checkout"]
