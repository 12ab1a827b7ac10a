"""Contributions of latents to an output of one image: all are estimated, and the strongest are ablated beside some that are drawn.

Suffixes: s latents, n the latents that are ablated.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32, Float64, UInt8
from torch import Tensor

from ommatid.errors import InputError
from ommatid.intervene.attribution import Agreement, Attributor, Completeness, agreement, similarity
from ommatid.intervene.readout import Readout
from ommatid.metrics import ablation_sparsity
from ommatid.vlm import Score

Method = Literal["cheap", "integrated", "exact"]
"""How effects of latents on an output are computed: see `ommatid.intervene.attribution`."""


@dataclass(frozen=True, eq=False)
class Output:
    """An output of the model that is attributed to latents."""

    name: str
    """The output in words."""
    score: Score
    """The output as a number per image."""
    measure: str
    """What the number is: cosine, logit, log-odds or activation."""


def compare_texts(readout: Readout, texts: Sequence[str], model: str) -> Output:
    """Return how much an image is like a text, or like the first of two texts rather than the second.

    Args:
        readout: Readout of the texts, or of classes, of which the texts are then one or two.
        texts: One text, or two.
        model: Name of the model, for messages.

    Raises:
        InputError: A text is not among the names of the readout, or both are the same to the model.
    """
    is_head = readout.bias is not None
    if len(texts) == 2:
        one, other = (readout.weights[readout.index(text)] for text in texts)
        if (one - other).norm() < 1e-6 * one.norm():
            raise InputError(f"texts {texts[0]!r} and {texts[1]!r} are the same to {model}: give other words")
        return Output(f"{texts[0]!r} − {texts[1]!r}", readout.difference(*texts), "logit" if is_head else "cosine")
    if is_head:
        return Output(f"log-odds of {texts[0]!r}", readout.log_odds(texts[0]), "log-odds")
    return Output(repr(texts[0]), similarity(readout.weights[readout.index(texts[0])].float()), "cosine")


@dataclass(frozen=True, eq=False)
class Attributed:
    """Effects of an SAE's latents on one output, on one image."""

    effects_s: Float64[Tensor, " latents"]
    """Effect of each latent by the chosen method, `(s,)`; 0 where it is silent."""
    acts_s: Float32[Tensor, " latents"]
    """Largest activation of each latent on any token, `(s,)`."""
    value: float
    """The output itself."""
    exact: Mapping[int, float]
    """Exact effects of the strongest latents, strongest estimate first, and then those of some others."""
    others: tuple[int, ...]
    """Latents among these that were drawn at random from those that fire."""
    maps: Callable[[Sequence[int]], Float32[Tensor, "kept chosen"]]
    """Function that returns the cheap or integrated effects of latents by kept token, `(tokens, latents)`."""
    agreement: Agreement | None
    """Agreement of the estimates with the exact effects; None if all effects are exact."""
    completeness: Completeness | None
    """The two sides of the completeness identity; None if effects are exact, which do not add up, as latents interact."""

    @cached_property
    def sparsity(self) -> float:
        """Effective number of latents that carry the output (Gao et al. 2024)."""
        return ablation_sparsity(self.effects_s)


def attribute_image(
    attributor: Attributor,
    pixels: UInt8[Tensor, "1 height width 3"],
    output: Output,
    *,
    method: Method = "cheap",
    n_top: int,
    n_others: int,
    rng: np.random.Generator,
    baseline_d: Float32[Tensor, " d_out"] | None = None,
) -> Attributed | None:
    """Attribute an output of one image to the latents that fire on it.

    Args:
        attributor: The model and the SAE.
        pixels: uint8 pixels of the image, `(1, H, W, 3)`.
        output: The output.
        method: How effects are computed; if they are exact, every latent that fires is ablated.
        n_top: Number of the strongest latents by the estimate that are ablated.
        n_others: Number of others that are ablated, drawn from those that fire.
        rng: Generator of the draw.
        baseline_d: As for `Attributor.cheap`.

    Returns:
        The effects; None if the output does not depend on any latent that fires.
    """
    code, score = attributor.encode(pixels), output.score
    firing = code.firing.tolist()
    if method == "integrated":
        estimate = attributor.integrated(pixels, score, 10, code, baseline_d)
    else:
        estimate = attributor.cheap(pixels, score, code, baseline_d)
    effects_s, acts_s = estimate.by_image[0].double().cpu(), torch.zeros(code.n_latents)
    acts_s.scatter_reduce_(0, code.entries.latents.cpu(), code.entries.values.float().cpu(), "amax")
    if firing and not effects_s.any():
        return None
    if method == "exact":
        chosen, others = firing, []
    else:
        order = effects_s.abs().sort(descending=True, stable=True).indices.tolist()
        strongest = [latent for latent in order[:n_top] if effects_s[latent]]
        others = rng.permutation(np.setdiff1d(firing, strongest))[:n_others].tolist()
        chosen = strongest + others
    exact_n = attributor.exact(pixels, score, chosen, code)[0].double().cpu()
    exact = dict(zip(chosen, exact_n.tolist(), strict=True))
    sides = attributor.completeness(pixels, score, estimate)
    value = float(sides.plain_b[0])

    def maps(latents: Sequence[int]) -> Tensor:
        return estimate.maps(latents)[0].float().cpu()

    if method == "exact":
        effects_s = torch.zeros_like(effects_s)
        effects_s[chosen] = exact_n
        return Attributed(effects_s, acts_s, value, exact, (), maps, None, None)
    compared = agreement(effects_s[chosen], exact_n, output.name, method)
    return Attributed(effects_s, acts_s, value, exact, tuple(others), maps, compared, sides)
