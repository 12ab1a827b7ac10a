"""Section `label`, and the kinds of labeller, each of which is implemented by `ommatid/label/labellers/<kind>.py`."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat

from ommatid.config.section import Section, unique_name

Cost = Literal["tried", "none", "unknown"]


class LabellerSection(Section):
    """Base of the kinds of labeller."""

    cost: ClassVar[Cost] = "unknown"
    """How `ommatid estimate` treats the labeller's time: measured on a sample, none, or unknown and listed as left out."""
    is_selective: ClassVar[bool] = False
    """Whether the labeller may pass over latents without a status, as people do."""


class VocabularyLabeller(LabellerSection):
    """Labels each latent with the word of a list that is nearest to its strongest images in the joint image-text space."""

    cost: ClassVar[Cost] = "tried"

    kind: Literal["vocabulary"]
    words: Annotated[tuple[str, ...], Field(min_length=1)]
    """Word lists: `imagenet`, `common`, or the path of a text file with one word or phrase per line."""
    by: Literal["mean", "soft_wpmi"] = "mean"
    """Criterion: `mean` for the cosine to the activation-weighted mean of the images, `soft_wpmi` for CLIP-Dissect (arXiv 2204.10965)."""

    def identity(self) -> dict[str, Any]:
        """Return the values that determine the labels, with the checksums of the word lists."""
        return super().identity() | {"files": {path: checksum for path in self.words if (checksum := _checksum(path))}}


class HumanLabeller(LabellerSection):
    """Uses labels that people wrote."""

    cost: ClassVar[Cost] = "none"
    is_selective: ClassVar[bool] = True

    kind: Literal["human"]
    path: str
    """Log of reviews, which ends in .jsonl, or CSV file with the columns latent, label and, if there are several SAEs, sae; relative to the
    checkout or absolute."""

    @property
    def is_log(self) -> bool:
        """Whether the file is a log of reviews; see `ommatid.reviews`."""
        return self.path.endswith(".jsonl")

    def identity(self) -> dict[str, Any]:
        """Return the values that determine the labels, with the checksum of the file."""
        return super().identity() | {"files": {self.path: names_checksum(Path(self.path)) if self.is_log else _checksum(self.path)}}


def names_checksum(path: Path) -> str | None:
    """Return the sha256 of those lines of a log of reviews that give names or take them back; None if there are none, or no file.

    No other line can change a label: a feature's direction is that of the latent of the SAE that the line names.
    """
    digest, ids = hashlib.sha256(), set[str]()
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and (event.get("kind") == "rename" or (event.get("kind") == "undo" and str(event.get("value")) in ids)):
            ids.add(str(event.get("id")))
            digest.update(line + b"\n")
    return digest.hexdigest() if ids else None


def _checksum(path: str) -> str | None:
    """Return the sha256 of a file; None if there is no such file, which the stage will report."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else None


class VlmLabeller(LabellerSection):
    """Asks a vision-language model on an OpenAI-compatible server; the key is in OPENAI_API_KEY (docs/users/labels-from-models.md)."""

    runtime_keys: ClassVar[frozenset[str]] = frozenset({"url", "requests_per_minute", "concurrency", "timeout"})

    kind: Literal["vlm"]
    model: Annotated[str, Field(min_length=1)]
    """Name of the model on the server."""
    url: Annotated[str, Field(pattern=r"^https?://[^\s@?#]+$")] = "http://localhost:8000/v1"
    """Base URL of the server, which ends in /v1 for most."""
    max_requests: Annotated[int, Field(ge=1)] | None = None
    """Largest number of requests in a run, including failed ones; null for no limit."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Number of tokens, in prompts and answers, after which a run sends no more requests; null for no limit."""
    requests_per_minute: PositiveFloat | None = None
    """Largest number of requests per minute, which are then evenly spaced; null for no limit."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 4
    """Number of concurrent requests; servers differ much in how many they handle well."""
    timeout: PositiveFloat = 120.0
    """Seconds to wait for an answer."""


class CaptionerLabeller(LabellerSection):
    """Captions images with a transformers model on this machine; the label is the phrase that captions of firing images share."""

    kind: Literal["captioner"]
    path: str = "Salesforce/blip-image-captioning-base"
    """A hub name, or a local folder with config, weights, tokenizer and preprocessor."""


Labeller = Annotated[VocabularyLabeller | HumanLabeller | VlmLabeller | CaptionerLabeller, Field(discriminator="kind")]


class LabelParams(Section):
    """Stage `label`: labels every latent, and scores the labels on held-out images."""

    labellers: Annotated[tuple[Labeller, ...], Field(min_length=1)]
    """Labellers to use; `features` shows the label by people or, without one, that with the best score, the first of equal ones."""
    n_examples: Annotated[int, Field(ge=2, le=256)]
    """Number of images, none held out, that a label is made from: the strongest for a vocabulary, half of them weaker for other kinds."""
    min_examples: Annotated[int, Field(ge=2, le=256)]
    """Number of images in either half below which a latent gets the status too_few_examples instead of a label."""
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    """Seed of the negatives and of the controls."""

    def identity(self) -> dict[str, Any]:
        """Return the values that determine the labels, with the checksums of the labellers' files, as edited files give other labels."""
        return super().identity() | {"labellers": [labeller.identity() for labeller in self.labellers]}

    def each(self) -> dict[str, Labeller]:
        """Return the labellers by their name in `labels.labeller`: their kind, with a number if several are of one kind."""
        by_name: dict[str, Labeller] = {}
        for labeller in self.labellers:
            by_name[unique_name(labeller.kind, by_name)] = labeller
        return by_name

    @property
    def trial(self) -> tuple[Labeller, ...]:
        """Labellers with which `ommatid estimate` tries to label a sample.

        If none can be tried, it is a vocabulary, since the labels of all kinds cost the same to score.
        """
        tried = tuple(labeller for labeller in self.labellers if labeller.cost == "tried")
        return tried or (VocabularyLabeller(kind="vocabulary", words=("imagenet", "common")),)
