"""The steering score of Pach et al. (arXiv 2504.02821): whether a clamped latent makes a model speak of the images that activate it.

The model answers in one word, and the score is the cosine of the word's text embedding and the mean embedding of the latent's strongest
images. As in the published script (steering_score.py, with the class Llava, of ExplainableML/sae-for-vlm):

- The question is ONE_WORD, after the image, in the model's chat template; answers are decoded greedily and have at most 5 tokens.
- A latent is set to 100 on every token of the tower's block, the class token included, and the code is decoded without the SAE's error.
- The word is what precedes the first blank in the answer, with any punctuation.
- Text embeddings are of the word alone, without a template. Those of the images are averaged with the norms that they have.

It differs in one respect: of an answer without a word, the script embeds the beginning of the prompt; here it has no score, and is counted.
Since the published baseline runs no SAE at all, dropping the error alone may change answers, so the arm `untouched` decodes the code as it
is.

Shapes: b images, t tokens, l latents that are clamped, s latents of the SAE, d width, n strongest images, e width of the joint space.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from ommatid.config.intervene import ONE_WORD
from ommatid.errors import InputError, ModelError
from ommatid.metrics.interventions import steering_score
from ommatid.sae.model import SAE
from ommatid.vlm import Replacement, VisionModel, check_hookpoint
from ommatid.vlm.speaking import Images, Speaker

DOSE = 100.0
"""Activation to which a latent is clamped, in the SAE's own units."""
MAX_NEW_TOKENS = 5


@dataclass(frozen=True)
class SteeringScore:
    """Words and scores in three arms: `none`, the model as it is; `untouched`, without the error; and `targeted`, with a latent clamped.

    The words of the first two arms do not depend on the latent.
    """

    words: Mapping[str, tuple[tuple[str, ...], ...]]
    """What precedes the first blank in each answer, by arm, latent and image; "" if the answer is empty."""
    scores: Mapping[str, Float32[Tensor, "latents images"]]
    """Cosines by arm, latent and image, `(l, b)`; NaN where there is no word."""

    @property
    def means(self) -> Mapping[str, Float32[Tensor, " latents"]]:
        """Mean over the images on which a word was said by arm and latent, `(l,)`; NaN if there is none."""
        return {arm: scores.nanmean(1) for arm, scores in self.scores.items()}

    @property
    def n_silent(self) -> Mapping[str, int]:
        """Number of answers without a word by arm, over all latents."""
        return {arm: int(scores.isnan().sum()) for arm, scores in self.scores.items()}


def score_steering(
    speaker: Speaker,
    sae: SAE,
    latents: Sequence[int],
    images: Images,
    joint: VisionModel,
    strongest: Float[Tensor, "latents n d_embed"],
    dose: float = DOSE,
    prompt: str | Path = ONE_WORD,
    batch: int = 16,
) -> SteeringScore:
    """Clamp latents one at a time, and compare the words that the model then says with the images that activate them.

    Args:
        speaker: The model that answers.
        sae: Autoencoder of the model's tower; it names its hookpoint.
        latents: The latents.
        images: Images, on each of which the question is asked for each latent.
        joint: Model of the joint space, which embeds words as they are, without a template.
        strongest: Embeddings in that space of each latent's strongest images, `(l, n, e)`; 16 of them as published. They are averaged with
            the norms that they have, so give them as the model computes them.
        dose: Activation to which a latent is clamped on every token.
        prompt: The question, or the path of a file that holds it.
        batch: Number of images that are answered at once.

    Returns:
        The words and the scores.

    Raises:
        InputError: A latent does not exist, or `strongest` does not have one row of embeddings for each latent.
        ModelError: The SAE does not fit the hookpoint or is a transcoder, the joint model has no text tower, or as for `Speaker.answer`.
    """
    _check(speaker, sae, latents, joint, strongest)

    def ask(replacement: Replacement | None) -> tuple[str, ...]:
        hookpoint = None if replacement is None else sae.config.hookpoint
        parts = (images[start : start + batch] for start in range(0, len(images), batch))
        answers = (text for part in parts for text in speaker.answer(part, prompt, replacement, hookpoint, MAX_NEW_TOKENS))
        return tuple(text.split(" ")[0] for text in answers)

    words = {
        "none": (ask(None),) * len(latents),
        "untouched": (ask(lambda x: decode_clamped(sae, x)),) * len(latents),
        "targeted": tuple(ask(lambda x, latent=latent: decode_clamped(sae, x, latent, dose)) for latent in latents),
    }
    said = sorted({word for arm in words.values() for row in arm for word in row} - {""})
    texts = joint.embed_text(said).cpu() if said else torch.empty(0, strongest.shape[2])
    known = torch.stack([steering_score(top.cpu(), texts) for top in strongest])  # by latent and word
    known = torch.cat([known, torch.full_like(strongest[:, 0, :1].cpu(), torch.nan)], 1).float()
    place = {word: at for at, word in enumerate([*said, ""])}
    scores = {
        arm: torch.stack([of_latent[[place[word] for word in row]] for row, of_latent in zip(rows, known, strict=True)])
        for arm, rows in words.items()
    }
    return SteeringScore(words, scores)


def decode_clamped(
    sae: SAE, x_btd: Float[Tensor, "batch tokens d_model"], latent: int | None = None, dose: float = 0.0
) -> Float[Tensor, "batch tokens d_model"]:
    """Return the reconstruction x̂ of tokens `(b, t, d)`, without the SAE's error, with a latent set to a dose if one is given."""
    acts = sae.encode(x_btd.flatten(0, 1))
    if latent is not None:
        acts[:, latent] = dose
    return sae.decode(acts).unflatten(0, x_btd.shape[:2])


def _check(speaker: Speaker, sae: SAE, latents: Sequence[int], joint: VisionModel, strongest: Tensor) -> None:
    point = check_hookpoint(speaker, sae.config.hookpoint)
    if sae.config.target is not None or sae.d_model != point.d_model:
        what = "is a transcoder" if sae.config.target is not None else f"has width {sae.d_model}"
        raise ModelError(f"the SAE {what}; an autoencoder of width {point.d_model} is needed at {sae.config.hookpoint} of {speaker.name}")
    if joint.d_embed is None:
        raise ModelError(f"{joint.name}: has no text tower, so words cannot be compared with images; use a model that has one")
    if odd := sorted(latent for latent in latents if not 0 <= latent < sae.n_latents):
        raise InputError(f"latents: {odd[0]}: the SAE has the latents 0 to {sae.n_latents - 1}")
    if not latents or strongest.ndim != 3 or len(strongest) != len(latents) or strongest.shape[-1] != joint.d_embed:
        raise InputError(
            f"strongest: shape {list(strongest.shape)}; expected [{len(latents)}, n, {joint.d_embed}], the joint-space embeddings of n "
            "images for each of one or more latents"
        )
