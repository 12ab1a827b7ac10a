"""Variants of SAE: what fires, what is penalised, and what is trained besides encoder and decoder. One file each."""

from typing import assert_never

from ommatid import config
from ommatid.sae.variants.archetypal import Archetypal
from ommatid.sae.variants.base import Guides, Settings, Variant
from ommatid.sae.variants.gated import Gated
from ommatid.sae.variants.jumprelu import JumpReLU
from ommatid.sae.variants.matryoshka import Matryoshka
from ommatid.sae.variants.relu import ReLU
from ommatid.sae.variants.topk import BatchTopK, TopK

__all__ = ["Guides", "Settings", "Variant", "make_variant"]


def make_variant(params: config.TrainedVariant, settings: Settings) -> Variant:
    """The variant that params ask for."""
    match params:
        case config.TopK():
            return TopK(settings)
        case config.BatchTopK():
            return BatchTopK(settings)
        case config.Matryoshka():
            return Matryoshka(settings, params.prefixes, params.random)
        case config.ReLU():
            return ReLU(settings, params.l1)
        case config.JumpReLU():
            return JumpReLU(settings, params.weight, params.bandwidth, params.sparsity)
        case config.Gated():
            return Gated(settings, params.l1)
        case config.Archetypal():
            return Archetypal(settings, params.points, params.relaxation)
        case _:
            assert_never(params)
