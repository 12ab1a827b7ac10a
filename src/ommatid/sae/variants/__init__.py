"""SAE variants: which latents fire, what is penalised, and what is trained besides encoder and decoder.

A variant consists of a section of `config/variants.py` and the module here that has the name of its `kind`, with a function `make`.
"""

from importlib import import_module

from ommatid.config import TrainedVariant
from ommatid.sae.variants.base import Guides, Settings, Variant

__all__ = ["Guides", "Settings", "Variant", "make_variant"]


def make_variant(params: TrainedVariant, settings: Settings) -> Variant:
    """Make the variant that the parameters select, with `make(params, settings)` of the module that has the name of its kind."""
    return import_module(f"{__name__}.{params.kind}").make(params, settings)
