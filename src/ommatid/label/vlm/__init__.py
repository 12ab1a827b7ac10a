"""The labeller `vlm`: a vision-language model behind any server that speaks OpenAI's protocol. How to use it: docs/labelling.md."""

from ommatid.label.vlm.labeller import Vlm
from ommatid.label.vlm.memory import Memory, in_checkout

__all__ = ["Memory", "Vlm", "in_checkout"]
