"""The labeller `vlm`: a vision-language model behind an OpenAI-compatible server. How to use it: docs/users/labels-from-models.md."""

from collections.abc import Callable, Mapping

from ommatid.config.label import VlmLabeller
from ommatid.label.labellers.base import Asked
from ommatid.label.labellers.vlm.cache import Memory, in_checkout
from ommatid.label.labellers.vlm.labeller import Vlm

__all__ = ["Memory", "Vlm", "in_checkout", "make"]


def make(name: str, params: VlmLabeller, saes: Mapping[str, int], say: Callable[[str], None]) -> Asked:
    """See `make_source`."""
    vlm = Vlm(name, params, in_checkout(), say)
    return Asked(vlm, vlm, params.concurrency)
