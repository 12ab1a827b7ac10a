"""Section `label`, and the kinds of labeller; each is made by `ommatid/label/labellers/<kind>.py`."""

import hashlib
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat

from ommatid.config.section import Section, unlike

Cost = Literal["tried", "none", "unknown"]


class LabellerSection(Section):
    """A kind of labeller."""

    cost: ClassVar[Cost] = "unknown"
    """What `ommatid estimate` knows of the time that it takes: it is tried on a sample, takes none, or is left out and named as such."""


class VocabularyLabeller(LabellerSection):
    """Words of a list: the one whose place in the joint space says best what a latent's strongest images have in common."""

    cost: ClassVar[Cost] = "tried"

    kind: Literal["vocabulary"]
    words: Annotated[tuple[str, ...], Field(min_length=1)]
    """Word lists: `imagenet`, `common`, or the path of a text file with one name a line."""
    by: Literal["mean", "soft_wpmi"] = "mean"
    """mean: cosine to the activation-weighted mean of the images; soft_wpmi: CLIP-Dissect (arXiv 2204.10965)."""

    def identity(self) -> dict[str, Any]:
        """With what the files say."""
        return super().identity() | {"files": {path: checksum for path in self.words if (checksum := _checksum(path))}}


class HumanLabeller(LabellerSection):
    """Labels that people gave."""

    cost: ClassVar[Cost] = "none"

    kind: Literal["human"]
    path: str
    """A CSV file with columns latent, label and, where there are several SAEs, sae, relative to the checkout or absolute."""

    def identity(self) -> dict[str, Any]:
        """With what the file says."""
        return super().identity() | {"files": {self.path: _checksum(self.path)}}


def _checksum(path: str) -> str | None:
    """sha256 of a file; None: there is none, which the stage then says."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else None


class VlmLabeller(LabellerSection):
    """A vision-language model behind an OpenAI-compatible server; its key is in OPENAI_API_KEY (docs/users/labels-from-models.md)."""

    how: ClassVar[frozenset[str]] = frozenset({"url", "requests_per_minute", "concurrency", "timeout"})

    kind: Literal["vlm"]
    model: Annotated[str, Field(min_length=1)]
    """Its name on the server."""
    url: Annotated[str, Field(pattern=r"^https?://[^\s@?#]+$")] = "http://localhost:8000/v1"
    """Base URL of the server, up to /v1 on most."""
    max_requests: Annotated[int, Field(ge=1)] | None = None
    """Requests that a run may send, failed ones too; null: no limit."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens, asked and answered, after which a run sends no further request; null: no limit."""
    requests_per_minute: PositiveFloat | None = None
    """No more than this, evenly spaced; null: as fast as answers come."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 4
    """Requests under way at a time; what one server makes of several differs much."""
    timeout: PositiveFloat = 120.0
    """Seconds to wait for an answer."""


class CaptionerLabeller(LabellerSection):
    """A transformers model that captions images, on this machine: the name is the phrase that captions of firing images share."""

    kind: Literal["captioner"]
    path: str = "Salesforce/blip-image-captioning-base"
    """A hub name, or a local folder with config, weights, tokenizer and preprocessor."""


Labeller = Annotated[VocabularyLabeller | HumanLabeller | VlmLabeller | CaptionerLabeller, Field(discriminator="kind")]


class LabelParams(Section):
    """Stage `label`: names for every latent, scored on images that did not make them."""

    labellers: Annotated[tuple[Labeller, ...], Field(min_length=1)]
    """Who gives names; `features` shows of each latent the one that scores best, and of equals the one that stands first here."""
    n_examples: Annotated[int, Field(ge=2, le=256)]
    """Images of the naming half that make the name: the strongest for a vocabulary; half strongest, half weaker for others."""
    min_examples: Annotated[int, Field(ge=2, le=256)]
    """A latent that fires on fewer images of either half gets no label but the status too_few_examples."""
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    """Seed of the negatives and of the controls."""

    def identity(self) -> dict[str, Any]:
        """With what the labellers' files say: a list that was edited gives other labels."""
        return super().identity() | {"labellers": [labeller.identity() for labeller in self.labellers]}

    def each(self) -> dict[str, Labeller]:
        """The labellers by `labels.labeller`: their kind, with a number where several are of one kind."""
        named: dict[str, Labeller] = {}
        for labeller in self.labellers:
            named[unlike(labeller.kind, named)] = labeller
        return named
