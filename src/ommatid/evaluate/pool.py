"""How a latent's activations over an image's tokens become the image's one: `evaluate.image_activation`."""

from collections.abc import Callable
from typing import assert_never

from torch import Tensor

from ommatid.config import EvaluateParams
from ommatid.errors import ConfigError
from ommatid.store import Artefact

Pool = Callable[[Tensor], Tensor]
"""From activations of tokens (images, tokens, latents) to those of images (images, latents)."""


def make_pool(params: EvaluateParams, activations: Artefact) -> Pool:
    """The image-level activation that params ask for.

    Raises:
        ConfigError: cls, and no class token was extracted.
    """
    match params.image_activation:
        case "max":
            return lambda acts: acts.amax(1)
        case "mean":
            return lambda acts: acts.mean(1)
        case "cls":
            place = _find_class_token(activations)
            return lambda acts: acts[:, place]
        case _:
            assert_never(params.image_activation)


def _find_class_token(activations: Artefact) -> int:
    """Its place among the tokens of an image."""
    per_image = activations.summary["tokens_per_image"]
    first = next((rows for rows in activations.iter_batches("eval", ["kind"], n_rows=per_image) if len(rows)), None)
    kinds = first["kind"].to_pylist() if first else ["cls"]
    if "cls" not in kinds:
        raise ConfigError(
            f"evaluate.image_activation: cls, and no class token was extracted at {activations.summary['hookpoint']}, only "
            f"{', '.join(sorted(set(kinds)))}; set it to max or mean, or extract.tokens to all or cls where the model has a class token"
        )
    return kinds.index("cls")
