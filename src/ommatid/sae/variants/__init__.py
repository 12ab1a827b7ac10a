"""SAE variants. Each decides which latents fire, what is penalised, and what is trained besides the encoder and the decoder.

A variant consists of a section in `config/variants.py` and a module here that is named after its `kind` and has a function `make`.
"""

from importlib import import_module

from ommatid.config import TrainedVariant
from ommatid.sae.variants.base import Guides, Settings, Variant

__all__ = ["Guides", "Settings", "Variant", "make_variant"]


def make_variant(params: TrainedVariant, settings: Settings) -> Variant:
    """Make the variant that the parameters select, by calling `make(params, settings)` of the module named after its kind."""
    return import_module(f"{__name__}.{params.kind}").make(params, settings)
