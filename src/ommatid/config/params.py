"""All sections of params.yaml together."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ommatid.config.drift import DriftParams
from ommatid.config.evaluate import EvaluateParams
from ommatid.config.extract import ExtractFiles, ExtractParams
from ommatid.config.images import ImagesParams
from ommatid.config.intervene import InterveneParams
from ommatid.config.label import LabelParams
from ommatid.config.section import Section
from ommatid.config.train import TrainParams


class CatalogParams(Section):
    """Stage `catalog`: the DuckDB file that users query."""

    n_neighbours: Annotated[int, Field(ge=1, le=64)]
    """Number of neighbours kept for each latent: those with the largest cosine of directions."""


class Margins(Section):
    """Margins by which a challenger must win to replace the champion."""

    min_ms_gain: Annotated[float, Field(ge=-1, le=1)]
    """Least amount by which the challenger's mean (MS - floor) must exceed the champion's."""
    max_fvu_loss: Annotated[float, Field(ge=0, le=1)]
    """Largest amount by which the challenger's FVU may exceed the champion's."""
    max_dead_rise: Annotated[float, Field(ge=0, le=1)]
    """Largest amount by which the challenger's share of dead latents may exceed the champion's."""


class RetrainParams(Margins):
    """Conditions under which the scheduled flow replaces the champion by a challenger, and what becomes of champions."""

    keep: Annotated[int, Field(ge=2, le=1000)] = 5
    """Number of champions whose SAE and catalogue are kept: the present one, the one that a rollback returns to, and the most recent
    others. What is kept takes disk space for an SAE and a catalogue each."""
    approval: bool = False
    """Whether a challenger that wins by the margins is published only after a person has approved it in the Prefect UI."""
    approval_timeout: Annotated[float, Field(gt=0, le=8760)] = 24.0
    """Hours that a person has to answer; after that the champion stays."""
    publish: Literal["local", "commit", "push"] = "local"
    """What happens to data/published after each decision: it stays on this machine; DVC stores it, and dvc.lock and data/published.dvc are
    committed to git; or both are also pushed to the remotes of DVC and of the branch, so that any clone can pull the champion."""

    @property
    def margins(self) -> Margins:
        """The margins alone."""
        return Margins(min_ms_gain=self.min_ms_gain, max_fvu_loss=self.max_fvu_loss, max_dead_rise=self.max_dead_rise)


class Params(Section):
    """All of params.yaml: a section for each stage, and those of drift and of retraining."""

    images: ImagesParams
    extract: Annotated[ExtractParams | ExtractFiles, Field(discriminator="source")]
    train: TrainParams
    evaluate: EvaluateParams
    label: LabelParams
    intervene: InterveneParams
    catalog: CatalogParams
    drift: DriftParams = DriftParams()
    retrain: RetrainParams

    @property
    def read_and_decoded(self) -> tuple[tuple[str, str | None], ...]:
        """Hookpoint that an SAE encodes and, for a transcoder, the one that it decodes: each pair of the SAEs of `train` once, in order."""
        return tuple(dict.fromkeys((one.hookpoint or self.extract.hookpoints[0], one.target) for one in self.train.each().values()))

    @model_validator(mode="after")
    def _hookpoints_are_extracted(self) -> "Params":
        known, first = self.extract.hookpoints, self.extract.hookpoints[0]
        listed = ", ".join(known)
        where = "train.runs or train.grid: each SAE" if self.train.runs or self.train.grid else "train.hookpoint:"
        for one in self.train.each().values():
            if one.hookpoint is None and len(known) > 1:
                raise ValueError(f"{where} must name one of extract.hookpoints to train on: {listed}")
            for key, name in (("hookpoint", one.hookpoint), ("target", one.target)):
                if name is not None and name not in known:
                    raise ValueError(f"train.{key}: {name!r} is not in extract.hookpoints: {listed}")
            if one.target is not None and one.target == (one.hookpoint or first):
                raise ValueError(f"train.target: {one.target} is the hookpoint itself; set it to null to reconstruct the hookpoint")
        return self

    @model_validator(mode="after")
    def _model_answers(self) -> "Params":
        kind = "of imported activations" if isinstance(self.extract, ExtractFiles) else self.extract.model.kind
        if self.intervene.answers and kind not in ("llava", "qwen"):
            raise ValueError(
                f"intervene.answers: a model {kind if ' ' in kind else f'of kind {kind}'} does not answer in words; set it to null, or "
                "extract.model to one of kind llava or qwen"
            )
        return self
