"""Section `evaluate`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from ommatid.config.section import Section

Baseline = Literal["sparse_neurons", "pca", "kmeans", "nmf"]


class EvaluateParams(Section):
    """Stage `evaluate`: what every latent does on the evaluation split."""

    image_activation: Literal["max", "mean", "cls"]
    """How a latent's activations over an image's tokens become the image's one; cls: that of the class token, which must be extracted."""
    n_top: Annotated[int, Field(ge=16, le=256)]
    """How many of a latent's strongest images are kept as examples; purity is about the 16 strongest, so that no fewer are kept."""
    n_per_decile: Annotated[int, Field(ge=1, le=64)]
    """How many examples are kept from each lower decile of a latent's firing images, besides the strongest."""
    baselines: tuple[Baseline, ...]
    """Dictionaries to compare the SAE with, besides raw neurons and an untrained SAE; [] for none. Costs: docs/users/baselines.md."""
    max_dead: Annotated[float, Field(gt=0, le=1)]
    """The gate fails when more than this share of latents fires on no evaluation image; a wide SAE on few images has many of them."""

    @field_validator("baselines")
    @classmethod
    def _baselines_differ(cls, value: tuple[Baseline, ...]) -> tuple[Baseline, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"names one twice: {', '.join(value)}")
        return value
