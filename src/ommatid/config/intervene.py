"""Section `intervene`, and the ways to choose the latents on which the model is run again."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ommatid.config.models import ClipModel, LiteModel, SiglipModel
from ommatid.config.section import Section

Ranking = Literal["ms", "label_score", "output_score", "attribution"]


class BestLatents(Section):
    """Chooses the latents that rank highest by a number, or by each of several."""

    kind: Literal["best"]
    by: Annotated[tuple[Ranking, ...], Field(min_length=1)]
    """Numbers by which latents are ranked, one or a list:

    - ms: their MonoSemanticity score
    - label_score: the score of their label
    - output_score: the output score of setting each to dose 1 on a few images, a pass through the rest of the model for each live latent
    - attribution: the mean size of what classes owe to them

    A latent that ranks high by several is chosen once, and the next one takes its place."""
    n: Annotated[int, Field(ge=1, le=2**20)]
    """Number of latents to choose from each SAE by each number."""

    @field_validator("by", mode="before")
    @classmethod
    def _make_list(cls, by: Any) -> Any:
        return (by,) if isinstance(by, str) else by

    @field_validator("by")
    @classmethod
    def _are_different(cls, by: tuple[Ranking, ...]) -> tuple[Ranking, ...]:
        _check_different(by)
        return by


class ListedLatents(Section):
    """Chooses the latents of a list."""

    kind: Literal["listed"]
    latents: Annotated[tuple[Annotated[int, Field(strict=True, ge=0, lt=2**20)], ...], Field(min_length=1)]
    """Indices of the latents, the same in every SAE."""

    @field_validator("latents")
    @classmethod
    def _are_different(cls, latents: tuple[int, ...]) -> tuple[int, ...]:
        _check_different(latents)
        return latents


class FiringLatents(Section):
    """Chooses every latent that fires often enough."""

    kind: Literal["firing"]
    min_images: Annotated[int, Field(ge=1)]
    """Number of evaluation images on which a latent must fire to be chosen."""


ChosenLatents = Annotated[BestLatents | ListedLatents | FiringLatents, Field(discriminator="kind")]


ONE_WORD = "What is shown in this image? Use exactly one word!"
"""The question of Pach et al. (arXiv 2504.02821)."""


def find_prompt_file(question: str) -> Path | None:
    """Return the path of a question's text file; None if it is the question itself. A file's name ends in `.txt`."""
    return Path(question).expanduser() if question.endswith(".txt") else None


class AnswersParams(Section):
    """What a model that answers in words is asked about each image while its vision tower is edited."""

    question: Annotated[str, Field(pattern=r"\S")] = ONE_WORD
    """The question, or the path of a text file that holds it and whose name ends in .txt."""
    max_new_tokens: Annotated[int, Field(ge=1, le=256)] = 5
    """Largest number of tokens in an answer, of which the first word counts."""
    batch: Annotated[int, Field(ge=2, le=1024)] = 16
    """Number of images about which the model is asked at once."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the whole model; auto is bfloat16 if the hardware computes in it, and float32 otherwise."""
    device_map: Literal["auto"] | None = None
    """auto spreads the model over all GPUs and the main memory, which needs accelerate; null puts it on one device."""
    joint: Annotated[LiteModel | ClipModel | SiglipModel, Field(discriminator="kind")] | None = None
    """Model whose embeddings of images and words the steering score of Pach et al. compares; null leaves this score out."""

    def identity(self) -> dict[str, Any]:
        """Return the values that determine the answers, with the question that is in a file."""
        file = find_prompt_file(self.question)
        text = file.read_bytes().decode(errors="replace") if file and file.is_file() else self.question
        return super().identity() | {"question": text}


class AuditParams(Section):
    """Which features are tested for going with a class for the wrong reason; all are counted."""

    n: Annotated[int, Field(ge=0, le=4096)] = 16
    """Number of suspicious pairs of a class and a latent that are tested by ablating the latent, the most suspicious first."""
    attributes: Annotated[str, Field(min_length=1)] | None = None
    """CSV or Parquet file of what the images have beside their class, such as path,ruler with the values yes and no
    (docs/users/interventions.md); null if it is not known."""


class InterveneParams(Section):
    """Stage `intervene`: sets latents to chosen activations and measures what the model's output does then, beside controls."""

    latents: ChosenLatents
    """Latents to set: {kind: best, by: [ms, output_score], n: 8}, {kind: listed, latents: [3, 17]} or {kind: firing, min_images: 8}."""
    doses: Annotated[tuple[Annotated[float, Field(strict=True, ge=0, le=100)], ...], Field(min_length=1)]
    """Activations to set, in units of the 99th percentile of the latent's own positive activations; 0 removes the latent."""
    n_images: Annotated[int, Field(ge=16)]
    """Number of evaluation images to run the model on, drawn evenly from the classes if there are any."""
    draws: Annotated[int, Field(ge=3, le=64)]
    """Number of draws of each random control."""
    max_drift: Annotated[float, Field(ge=0, le=10)]
    """Largest drift of the output under an edit that still counts, as a multiple of what two different images differ by: the mean of
    1 - cosine of the outputs with and without the edit, divided by that of the outputs of two images. Of answers, it is the divergence on
    the latent's strongest images, divided by that of the answers about two images."""
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    """Seed of the images and of the random controls."""
    answers: AnswersParams | None = None
    """What to ask a model of kind llava or qwen about each image, whose answers then decide the status; null asks nothing."""
    masks: Annotated[str, Field(min_length=1)] | None = None
    """Folder or URL of a PNG file for each image, in which each pixel is the index of its class and 0 the background
    (docs/users/interventions.md); or, of drawn images, their plan, such as data/shapes.json. null if there are no masks."""
    head: Annotated[str, Field(min_length=1)] | None = None
    """A safetensors file with a linear head by which classes are read from the model's output (docs/users/interventions.md). null reads
    them by the texts of their names or, if the model has no text tower, by a head fitted to labelled training images."""
    audit: AuditParams = AuditParams()
    """Which features are tested for going with a class for the wrong reason."""

    def identity(self) -> dict[str, Any]:
        """Return the values that determine the interventions, with the question in a file; without `answers` if nothing is asked."""
        asked = {"answers": self.answers.identity()} if self.answers else {}
        return {name: value for name, value in super().identity().items() if name != "answers"} | asked

    def trial(self, n: int) -> "InterveneParams":
        """Return the params with which `ommatid estimate` tries `n` latents: those of another choice cost the same."""
        by = self.latents.by if isinstance(self.latents, BestLatents) else ("ms",)
        return self.model_copy(update={"latents": BestLatents(kind="best", by=by, n=math.ceil(n / len(by)))})

    @field_validator("doses")
    @classmethod
    def _doses_are_different(cls, doses: tuple[float, ...]) -> tuple[float, ...]:
        _check_different(doses)
        return doses


def _check_different(values: Sequence[float | str]) -> None:
    if twice := [value for value in values if values.count(value) > 1]:
        names = [value if isinstance(value, str) else f"{value:g}" for value in (twice[0], *values)]
        raise ValueError(f"names {names[0]} twice: {', '.join(names[1:])}")
