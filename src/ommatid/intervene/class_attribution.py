"""Attribution of the log-odds of the most common classes to all latents by gradients, and exactly to the first few of each class."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from ommatid.events import Listener, Progress
from ommatid.intervene.attribution import Attributor, MeanEffects
from ommatid.intervene.study import Study
from ommatid.metrics import ablation_sparsity
from ommatid.schemas import N_ATTRIBUTED

N_EXACT = 8
"""Number of latents to which a class is attributed exactly as well."""


@dataclass(frozen=True)
class ClassAttribution:
    """Mean effects of all latents on the log-odds of classes, by gradients."""

    effects: dict[str, MeanEffects]
    """Effects over the images of the study, by class, the most common first; empty if no class is read from the output."""

    @cached_property
    def sizes(self) -> Float64[Tensor, " latents"] | None:
        """Mean size of each latent's effect over images and classes, `(s,)`; None if no class is read from the output."""
        return torch.stack([one.mean_magnitude for one in self.effects.values()]).mean(0) if self.effects else None


def attribute_classes(study: Study, on_event: Listener) -> ClassAttribution:
    """Attribute classes to all latents by one backward pass for each class and batch of images."""
    if not study.readout:
        return ClassAttribution({})
    scores = {name: study.readout.log_odds(name) for name in study.common}
    attributor = _attributor(study)
    effects = {name: MeanEffects(study.subject.sae.n_latents) for name in scores}
    for done, pixels in study.iter_pixels():
        code = attributor.encode(pixels)
        for name, score in scores.items():
            effects[name].add(attributor.cheap(pixels, score, code).by_image)
        on_event(Progress("attribute classes", done, len(study.images)))
    return ClassAttribution(effects)


def attribution_rows(study: Study, found: ClassAttribution) -> list[dict[str, Any]]:
    """Make the rows of the table `attributions`, and measure the effects of each class's first latents exactly."""
    if not study.readout:
        return []
    n = len(study.images)
    cheap = {name: effects.mean for name, effects in found.effects.items()}
    ranked = {name: effects.abs().topk(min(N_ATTRIBUTED, len(effects))).indices.tolist() for name, effects in cheap.items()}
    exact = {name: MeanEffects(min(N_EXACT, study.subject.sae.n_latents)) for name in cheap}
    scores, attributor = {name: study.readout.log_odds(name) for name in cheap}, _attributor(study)
    for _, pixels in study.iter_pixels():
        code = attributor.encode(pixels)
        for name, score in scores.items():
            exact[name].add(attributor.exact(pixels, score, ranked[name][:N_EXACT], code))
    return [
        {
            "output": name, "rank": rank, "latent": latent, "effect": float(effects[latent]),
            "exact": float(exact[name].mean[rank - 1]) if rank <= N_EXACT else None,
            "sparsity": ablation_sparsity(effects), "n_images": n,
        }
        for name, effects in cheap.items()
        for rank, latent in enumerate(ranked[name], start=1)
        if effects[latent]
    ]  # fmt: skip


def _attributor(study: Study) -> Attributor:
    subject = study.subject
    return Attributor(subject.model, subject.device_sae, subject.reads, subject.writes)
