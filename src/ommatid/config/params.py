"""All sections together."""

from typing import Annotated

from pydantic import Field, model_validator

from ommatid.config.evaluate import EvaluateParams
from ommatid.config.extract import ExtractFiles, ExtractParams
from ommatid.config.images import ImagesParams
from ommatid.config.label import LabelParams
from ommatid.config.section import Section
from ommatid.config.train import TrainParams


class CatalogParams(Section):
    """Stage `catalog`: the DuckDB file."""

    n_neighbours: Annotated[int, Field(ge=1, le=64)]
    """Nearest latents by cosine of their directions kept for each latent."""


class RetrainParams(Section):
    """When the scheduled flow lets a challenger replace the champion."""

    min_ms_gain: Annotated[float, Field(ge=-1, le=1)]
    """The challenger's mean (MS - floor) must exceed the champion's by at least this."""
    max_fvu_loss: Annotated[float, Field(ge=0, le=1)]
    """Its FVU may be at most this much higher."""
    max_dead_rise: Annotated[float, Field(ge=0, le=1)]
    """Its share of dead latents may be at most this much higher."""


class Params(Section):
    """All of params.yaml: a section for each stage, and one for retraining."""

    images: ImagesParams
    extract: Annotated[ExtractParams | ExtractFiles, Field(discriminator="source")]
    train: TrainParams
    evaluate: EvaluateParams
    label: LabelParams
    catalog: CatalogParams
    retrain: RetrainParams

    @property
    def hookpoint(self) -> str:
        """Where the activations were captured that the SAE is trained on."""
        return self.train.hookpoint or self.extract.hookpoints[0]

    @model_validator(mode="after")
    def _hookpoint_is_extracted(self) -> "Params":
        known, wanted = self.extract.hookpoints, self.train.hookpoint
        if wanted is None and len(known) > 1:
            raise ValueError(f"train.hookpoint: must say which of extract.hookpoints to train on: {', '.join(known)}")
        for key, name in (("hookpoint", wanted), ("target", self.train.target)):
            if name is not None and name not in known:
                raise ValueError(f"train.{key}: {name!r} is not in extract.hookpoints: {', '.join(known)}")
        return self
