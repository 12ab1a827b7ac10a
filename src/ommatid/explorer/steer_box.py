"""What the forms need with which a visitor steers: their fields, their limits, and why the model cannot be asked."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator

from ommatid.explorer.heat import Tile
from ommatid.explorer.model_client import HIGHEST_DOSE, LONGEST_TEXT, MOST_STEERED, MOST_TEXTS, Tokens
from ommatid.explorer.web import BadRequest, Query, View

N_CHOICES = 8
"""Images of a feature that a visitor can choose between."""
MOST_PATCHES = 4096
"""Most patches that can be chosen between."""
Latents = Annotated[list[int], Field(min_length=1, max_length=MOST_STEERED)]


class SteerQuery(Query):
    """What to steer on an image, and how."""

    latents: Latents
    """The latents, each once."""
    image: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    """Number of the image; left out: the one on which the first latent is strongest."""
    dose: Annotated[float, Field(ge=0, le=HIGHEST_DOSE, allow_inf_nan=False)] = 1.0
    """A dose to compute beside those of the curve; 1 is the 99th percentile of the latent's positive activations."""
    tokens: Tokens = "all"
    """Tokens that are edited."""
    patches: Annotated[str, Field(max_length=20_000, pattern=r"^\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*$")] = ""
    """Numbers of the edited patches, row by row from the top left, such as 0-3,8."""
    texts: Annotated[str, Field(max_length=MOST_TEXTS * (LONGEST_TEXT + 2))] = ""
    """Texts to compare the output with, one a line."""

    @field_validator("latents")
    @classmethod
    def _check_latents(cls, latents: list[int]) -> list[int]:
        if len(set(latents)) < len(latents):
            raise ValueError("name each latent once")
        return latents

    @property
    def text_lines(self) -> list[str]:
        """The texts."""
        return [line for line in self.texts.splitlines() if line.strip()]

    @property
    def patch_numbers(self) -> list[int]:
        """The numbers of the patches.

        Raises:
            BadRequest: A range is empty, or there are too many.
        """
        found: set[int] = set()
        for part in filter(None, self.patches.split(",")):
            first, _, last = part.partition("-")
            if (last and int(last) < int(first)) or int(last or first) >= MOST_PATCHES:
                raise BadRequest(f"patches: got {part!r}; expected numbers below {MOST_PATCHES:,}, such as 0-3,8")
            found |= set(range(int(first), int(last or first) + 1))
        return sorted(found)


def _why_not(view: View, sae: str) -> str | None:
    """Return why the model of an SAE cannot be asked, as far as its params say; None if it can."""
    extract = json.loads(view.opened.saes[sae]["params"]).get("extract", {})
    if "model" not in extract or extract.get("source") == "files":
        return "The activations were imported from files, so the model that they come from is not known, and nothing can be steered."
    return None


def make_steer_box(
    view: View, sae: str, query: SteerQuery | None, tiles: Sequence[Tile] = (), features: Mapping[int, Any] | None = None
) -> dict[str, Any]:
    """What the box of a page needs to show its form.

    Args:
        view: The request.
        sae: The SAE.
        query: What is chosen in the form; None if nothing is yet.
        tiles: Images to choose between.
        features: Latents to choose between, with what cards show of them.
    """
    return {
        "why_not": _why_not(view, sae),
        "query": query or SteerQuery.model_construct(latents=[]),
        "tiles": tiles,
        "features": features or {},
        "most_texts": MOST_TEXTS,
        "most_latents": MOST_STEERED,
        "highest": f"{HIGHEST_DOSE:g}",
    }
