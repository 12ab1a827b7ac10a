"""Variants of SAE: what fires, what is penalised, and what is trained besides encoder and decoder.

A variant is a section of `config/variants.py` and the module here that its `kind` names, with a function `make`.
"""

from importlib import import_module

from ommatid.config import TrainedVariant
from ommatid.sae.variants.base import Guides, Settings, Variant

__all__ = ["Guides", "Settings", "Variant", "make_variant"]


def make_variant(params: TrainedVariant, settings: Settings) -> Variant:
    """The variant of these params, made by `make(params, settings)` of the module that is named for its kind."""
    return import_module(f"{__name__}.{params.kind}").make(params, settings)
