"""Section `evaluate`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from ommatid.config.section import Section

Baseline = Literal["sparse_neurons", "pca", "kmeans", "nmf"]
ImageActivation = Literal["max", "mean", "cls"]


class EvaluateParams(Section):
    """Stage `evaluate`: measures every latent on the evaluation split."""

    image_activation: ImageActivation
    """How a latent's activations over an image's tokens become one; `cls` takes that of the class token, which must be extracted."""
    n_top: Annotated[int, Field(ge=16, le=256)]
    """Number of a latent's strongest images to keep as examples; at least 16, the number on which purity is measured."""
    n_per_decile: Annotated[int, Field(ge=1, le=64)]
    """Number of examples to keep from each lower decile of a latent's firing images."""
    baselines: tuple[Baseline, ...]
    """Dictionaries to compare the SAE with, beside raw neurons and an untrained SAE; [] for none. Their costs: docs/users/baselines.md."""
    max_dead: Annotated[float, Field(gt=0, le=1)]
    """Largest share of latents that may fire on no evaluation image; with more, the gate fails. Wide SAEs on few images need more."""

    @field_validator("baselines")
    @classmethod
    def _baselines_differ(cls, value: tuple[Baseline, ...]) -> tuple[Baseline, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"names one twice: {', '.join(value)}")
        return value
